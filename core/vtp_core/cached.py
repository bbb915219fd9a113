"""Losses of a whole batch over micro-batches: forwards without graph, losses, forwards again (arXiv 2101.06983).

What objectives read of all micro-batches is kept as leaves. Their losses are taken once, over all rows of this
process and, where they gather, of all processes; the gradients at the leaves are then carried through each
micro-batch's forwards, which are repeated: draws are keyed, so they give the same. Beside the leaves, what an
objective computes by itself (a text tower, a critic) is held for all rows; the forwards are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.forwards import Forwards
from vtp_core.kept import Kept, turns_of
from vtp_core.losses import Losses
from vtp_core.nodes import Node, Plan, Stage
from vtp_core.sharding import Sharding
from vtp_plugins.objective import AdversarialObjective

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def whole_batch(model: Model) -> frozenset[str]:
    """Objectives of which no micro-batch can be taken by itself.

    Those that couple rows, critics that move before their objective's loss, and those whose weight is a ratio of
    the whole batch's gradients, with what they are held against.
    """
    found: set[str] = set()
    for name, objective in model.objectives.items():
        keys = model.settings[name]
        first = isinstance(objective, AdversarialObjective) and keys.critic.order == "before"
        found |= {name} if objective.coupled or first else set()
        found |= {name, keys.balance.against} if keys.balance is not None else set()
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Micros:
    """A step's micro-batches.

    Attributes:
        plan: of the step.
        count: A.
        clock: of this process's whole batch, as if there were one micro-batch.
        forwards: the nodes of a plan over the micro-batch of an index.
        autocast: of forwards and losses.
        sharding: averages gradients where weights are dealt.
    """

    plan: Plan
    count: int
    clock: StepClock
    forwards: Callable[[Plan, int], Forwards]
    autocast: Autocast
    sharding: Sharding

    def backward(self, losses: Losses, names: frozenset[str]) -> dict[Node, int]:
        """Gradients of the step: those of ``names`` by way of leaves, those of the others as ever.

        Returns:
            How often each node of the last micro-batch was computed in the second pass.
        """
        stages = [stage for stage in self.plan.stages if losses.only in (None, *stage.readers)]
        kept = Kept(self, stages, names)
        self._whole(kept, replace(losses, parts=self.count, gradient=kept.at_anchor), stages, names)
        for micro in range(self.count):
            run = self.forwards(self.plan, micro)
            self._rest(run, kept, micro, losses, stages, names)
        return run.runs

    def _whole(self, kept: Kept, losses: Losses, stages: Sequence[Stage], names: frozenset[str]) -> None:
        """Losses of the whole batch, back to the leaves."""
        parts = [Stage((), turns_of(stage, names)) for stage in stages]
        for part, done in zip(parts, self.sharding.lasts(parts), strict=True):
            with self.autocast():
                total = losses.stage(kept, part)
            self.sharding.backward([total] if total is not None and total.requires_grad else [], done)
            self.sharding.close()

    def _rest(
        self,
        run: Forwards,
        kept: Kept,
        micro: int,
        losses: Losses,
        stages: Sequence[Stage],
        names: frozenset[str],
    ) -> None:
        """From the leaves of a micro-batch back to the weights, with the losses that are its own."""
        parts = [replace(stage, turns=turns_of(stage, names, False)) for stage in stages]
        lasts = self.sharding.lasts(parts, micro + 1 == self.count)
        for stage, part, done in zip(stages, parts, lasts, strict=True):
            with self.autocast():
                total = losses.stage(run, part)
                outputs, grads = kept.pairs(run, micro, stage.turns, lambda leaf: leaf.grad)
            if total is not None and total.requires_grad:
                outputs.append(total / self.count)
                grads.append(torch.ones_like(total))
            self.sharding.backward(outputs, done, grads)
            run.release(stage)
            self.sharding.close()
