"""What objectives read of all micro-batches, as leaves that look to them like the forwards of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_core.forwards import Forwards
from vtp_core.nodes import Handout, Stage, Turn
from vtp_plugins.needs import Outputs

if TYPE_CHECKING:
    from vtp_core.cached import Micros

Pairs = tuple[list[Tensor], list[Tensor]]


def turns_of(stage: Stage, names: frozenset[str], inside: bool = True) -> tuple[Turn, ...]:
    """The evaluations of a stage that are, or are not, of the whole batch."""
    return tuple(turn for turn in stage.turns if (turn[0] in names) == inside)


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one handout gave of one micro-batch: leaves where gradient is wanted, and masks by sampler."""

    outputs: Outputs
    masks: Mapping[str, Tensor]
    bare: frozenset[str]


class Kept:
    """Leaves of all micro-batches; to losses it is what the forwards of the whole batch would be.

    Args:
        micros: of the step.
        stages: that are run.
        names: objectives that read them.
    """

    def __init__(self, micros: Micros, stages: Sequence[Stage], names: frozenset[str]) -> None:
        self.micros, self.plan, self.clock = micros, micros.plan, micros.clock
        self._slots: dict[int, list[_Slot]] = {}
        still = replace(self.plan, live=frozenset())
        for micro in range(micros.count):
            run = micros.forwards(still, micro)
            for stage in stages:
                with micros.autocast():
                    for handout in self._handouts(turns_of(stage, names)):
                        self._slots.setdefault(id(handout), []).append(self._slot(run, handout))
                run.release(stage)

    def _handouts(self, turns: Sequence[Turn]) -> list[Handout]:
        return [handout for turn in turns for handout in self.plan.handouts[turn].values()]

    def _slot(self, run: Forwards, handout: Handout) -> _Slot:
        got, signals = run.hand(handout), run.signals
        for output, node in handout.outputs.items():
            got.values[output] = _leaf(got.values[output], node in self.plan.live)
        named = {output.partition("@")[2] for output in handout.outputs} - {""}
        masks = {name: signals.inputs.masks[name][:, : handout.rows] for name in named}
        bare = {o for o, node in handout.outputs.items() if o == "input" and signals.bare(node.view)}
        return _Slot(got, masks, frozenset(bare))

    def hand(self, handout: Handout) -> Outputs:
        """One slot over all micro-batches, in the order of this process's rows."""
        slots = self._slots[id(handout)]
        values = {output: _merged(slots, output) for output in handout.outputs}
        masks = [slot.outputs.mask for slot in slots]
        mask = None if masks[0] is None else _interleaved(masks, 1)
        return Outputs(values, mask, slots[0].outputs.grid)

    def pairs(
        self,
        run: Forwards,
        micro: int,
        turns: Sequence[Turn],
        gradient: Callable[[Tensor], Tensor | None],
    ) -> Pairs:
        """What a micro-batch's forwards give where leaves have a gradient, with the gradients."""
        outputs: list[Tensor] = []
        grads: list[Tensor] = []
        for handout in self._handouts(turns):
            if id(handout) not in self._slots:
                continue
            leaves = _leaves(self._slots[id(handout)][micro])
            found = {key: grad for key, leaf in leaves.items() if (grad := gradient(leaf)) is not None}
            if found:
                given = _tensors(run.hand(handout).values)
                outputs += [given[key] for key in found]
                grads += found.values()
        return outputs, grads

    def at_anchor(self, value: Tensor, anchor: nn.Parameter) -> Tensor | None:
        """Gradient of a loss on the leaves at a parameter behind them, of all micro-batches."""
        leaves = [leaf for slots in self._slots.values() for slot in slots for leaf in _leaves(slot).values()]
        own, *grads = torch.autograd.grad(value, [anchor, *leaves], retain_graph=True, allow_unused=True)
        by_leaf = {id(leaf): grad for leaf, grad in zip(leaves, grads, strict=True)}
        found = [] if own is None else [own]
        for micro in range(self.micros.count):
            with self.micros.autocast():
                run = self.micros.forwards(self.plan, micro)
                outputs, pulls = self.pairs(
                    run, micro, list(self.plan.handouts), lambda x: by_leaf.get(id(x))
                )
            if outputs:
                (grad,) = torch.autograd.grad(outputs, anchor, pulls, allow_unused=True)
                found += [] if grad is None else [grad]
        return torch.stack(found).sum(0) if found else None


# ---- leaves


def _leaf(value: Any, live: bool) -> Any:
    """The value cut off, asking for gradient where its node has one; tuples by part."""
    if isinstance(value, tuple):
        return tuple(_leaf(part, live) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(live and value.is_floating_point())


def _tensors(values: Mapping[str, Any]) -> dict[tuple[str, int], Tensor]:
    """Tensors by output, and by part where an output is a tuple."""
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
    return {
        (name, i): part
        for name, own in parts.items()
        for i, part in enumerate(own)
        if isinstance(part, Tensor)
    }


def _leaves(slot: _Slot) -> dict[tuple[str, int], Tensor]:
    return {key: value for key, value in _tensors(slot.outputs.values).items() if value.requires_grad}


# ---- rows of micro-batches as rows of the process: row j of micro-batch m is row m + A j


def _merged(slots: Sequence[_Slot], output: str) -> Any:
    values = [slot.outputs.values[output] for slot in slots]
    name = output.partition("@")[2]
    if name:
        return torch.cat(values)[_order([slot.masks[name] for slot in slots]).to(values[0].device)]
    if isinstance(values[0], tuple):
        return tuple(_interleaved(parts, 1) for parts in zip(*values, strict=True))
    return _interleaved(values, 0 if output in slots[0].bare else 1)


def _interleaved(values: Sequence[Any], axis: int) -> Any:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values), axis + 1).flatten(axis, axis + 1)  # A of (R, ...) -> (R A, ...)
    return [row for rows in zip(*values, strict=True) for row in rows]


def _order(masks: Sequence[Tensor]) -> Tensor:
    """Where the masked places of the merged mask lie among those of the micro-batches' masks, one after another."""
    places = []
    for micro, mask in enumerate(masks):  # (K, R, N)
        k, r, n = mask.nonzero().unbind(1)
        places.append((k * mask.shape[1] * len(masks) + r * len(masks) + micro) * mask.shape[2] + n)
    return torch.cat(places).argsort()
