"""Modules with all their weights beside those that hold a share: to measure as if nothing were dealt."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vtp_core import shards
from vtp_core.build import Model

_OWNERS = ("encoder", "bottleneck", "decoder", "generator")


class Plain:
    """Copies of the modules that make, read and decode latents, made before these are dealt; they hold no weights.

    Whatever a probe does with a tokenizer works on them, in the run's own precision and without a collective.

    Args:
        model: its tokenizer, generator, and objectives that export something.
        average: of the generator; None without one.
    """

    def __init__(self, model: Model, average: nn.Module | None) -> None:
        self.model = model
        live = dict(model.tokenizer_modules())
        live |= {} if model.generator is None else {"generator": model.generator}
        live |= {} if average is None else {"average": average}
        self._objectives = [name for name, objective in model.objectives.items() if objective.exports]
        live |= {f"objectives/{name}": model.objectives[name] for name in self._objectives}
        empty = {id(p): _empty(p) for module in live.values() for p in module.parameters()}
        self._copies: dict[str, nn.Module] = copy.deepcopy(live, empty)
        self._pairs = [
            pair
            for name, module in live.items()
            for pair in zip(self._copies[name].modules(), module.modules(), strict=True)
        ]

    @contextlib.contextmanager
    def filled(self) -> Iterator[tuple[Model, nn.Module | None]]:
        """The model on the copies, and its generator's average, with weights; every process must call this."""
        fetched: dict[int, nn.Parameter] = {}
        places = []
        for twin, module in self._pairs:
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                places.append((twin, name, twin.get_parameter(name)))
                if id(parameter) not in fetched:
                    fetched[id(parameter)] = nn.Parameter(shards.whole(parameter.data), requires_grad=False)
                setattr(twin, name, fetched[id(parameter)])
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                setattr(twin, name, buffer)
        fetched.clear()
        try:
            yield self._model(), self._copies.get("average")
        finally:
            for twin, name, nothing in places:
                setattr(twin, name, nothing)

    def _model(self) -> Model:
        own: dict[str, Any] = {name: self._copies[name] for name in _OWNERS if name in self._copies}
        objectives: Any = {name: self._copies[f"objectives/{name}"] for name in self._objectives}
        return replace(self.model, **own, objectives={**self.model.objectives, **objectives})


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
