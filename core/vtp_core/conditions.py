"""What samples are conditioned on: labels by name or number, texts, or their null."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.errors import StackFault, suggestion
from vtp_plugins.spec import Spec


class Conditions:
    """Conditions of one generator.

    Args:
        spec: says ``label``, ``embedding`` or nothing, and how many classes.
        name: the raw field that conditions it.
        names: of the labels.
        embed: texts to embeddings (n, E).
        device: where conditions go.
    """

    def __init__(
        self, spec: Spec, name: str | None, names: Sequence[str],
        embed: Callable[[Sequence[str]], Tensor] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.spec, self.name, self.names, self.embed, self.device = spec, name, tuple(names), embed, device

    def label(self, name: str | int) -> int:
        """The index of a label.

        Raises:
            StackFault: there is no such label.
        """
        self._check("label", "labels")
        if str(name) in self.names:
            return self.names.index(str(name))
        if str(name).isdigit() and int(name) < self.spec.classes:
            return int(name)
        raise StackFault(f"no label {name!r}{suggestion(str(name), self.names)}")

    def of(self, n: int, labels: Any, texts: Sequence[str] | None, seed: int, first: int = 0) -> Any:
        """Labels (n,) or embeddings (n, E), None without a condition.

        Args:
            n: samples.
            labels: their labels; None draws one for each.
            texts: their captions; None is the null of embeddings.
            seed: of drawn labels, sample by sample.
            first: number of the first sample.

        Raises:
            StackFault: labels or texts that the generator is not conditioned on, or another number of them.
        """
        if labels is not None:
            self._check("label", "labels")
        if texts is not None:
            self._check("embedding", "texts")
        given = labels if labels is not None else texts
        if given is not None and len(given) != n:
            raise StackFault(f"{len(given)} conditions for {n} samples")
        if self.spec.condition == "label":
            if labels is None:
                draws = StepClock(seed, instance="generate", rank=first).uniform("labels", n)
                labels = (draws * self.spec.classes).long()
            return torch.as_tensor(labels, dtype=torch.int64).to(self.device)
        if self.spec.condition == "embedding":
            if texts is None:
                return torch.zeros(n, self.spec.condition_width, device=self.device)
            assert self.embed is not None
            return self.embed(list(texts)).to(self.device)
        return None

    def templates(self, n: int) -> Any:
        """The same few conditions at every call."""
        return self.of(
            n, torch.arange(n) % self.spec.classes if self.spec.condition == "label" else None, None, 0
        )

    def null(self, condition: Tensor) -> Tensor:
        """The null class, or zeros for an embedding."""
        if condition.is_floating_point():
            return torch.zeros_like(condition)
        return torch.full_like(condition, self.spec.classes)

    def _check(self, kind: str, what: str) -> None:
        if self.spec.condition != kind:
            raise StackFault(f"this generator is conditioned on {self.name or 'nothing'}, not on {what}")
