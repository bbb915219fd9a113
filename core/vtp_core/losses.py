"""From handed-out outputs to the weighted loss of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vtp_core import balance, schedule
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.critics import Critics
from vtp_core.layout import checked_terms
from vtp_core.nodes import Handout, Plan, Stage
from vtp_core.tally import Tally
from vtp_plugins.needs import Outputs


class Given(Protocol):
    """What hands objectives their outputs: forwards, or what is kept of them."""

    plan: Plan
    clock: StepClock

    def hand(self, handout: Handout) -> Outputs:
        """One slot."""
        ...


@dataclass(slots=True)
class Losses:
    """Losses of one step, noted as they are computed.

    Args:
        model: with the objectives and their settings.
        step: optimizer steps taken.
        steps: of the run.
        tally: where terms and weights are noted.
        critics: that have their turns; None leaves them alone.
        only: the one objective whose loss is taken; None takes all.
        parts: micro-batches that an evaluation covers.
        gradient: of a loss at the anchor of a balance.
    """

    model: Model
    step: int
    steps: int
    tally: Tally
    critics: Critics | None = None
    only: str | None = None
    parts: int = 1
    gradient: balance.Gradient = balance.gradient

    def stage(self, run: Given, stage: Stage) -> Tensor | None:
        """The stage's weighted loss; None where nobody has one."""
        sums: dict[str, Tensor] = {}
        for name, turn in stage.turns:
            value = self._evaluated(run, name, turn)
            if value is not None:
                sums[name] = sums[name] + value if name in sums else value
        first = {name for name, turn in stage.turns if turn == 0}
        pulls = self._weighted(sums, first)
        if self.only is not None:
            return pulls.get(self.only)
        if not pulls:
            return None
        total = torch.stack(list(pulls.values())).sum() if len(pulls) > 1 else next(iter(pulls.values()))
        self._note("loss", total)
        return total

    def _note(self, name: str, value: Tensor | float) -> None:
        self.tally.add(name, value * self.parts)

    def _evaluated(self, run: Given, name: str, turn: int) -> Tensor | None:
        """An objective's loss before its weight, and its critic's turn; None if only the critic looks on."""
        objective, keys = self.model.objectives[name], self.model.settings[name]
        got = {slot: run.hand(handout) for slot, handout in run.plan.handouts[name, turn].items()}
        clock = run.clock.of(f"{name}#{turn}" if turn else name)
        try:
            noted = {} if self.critics is None else self.critics.turn(name, got, clock, "before")
            loss = None
            if name not in run.plan.watchers:
                terms = checked_terms(name, objective(got, clock))
                noted |= {f"{name}/{term}": value for term, value in terms.items()}
                loss = schedule.combined(name, keys, terms)
            if self.critics is not None:
                noted |= self.critics.turn(name, got, clock, "after")
        except Exception as error:
            error.add_note(f"in objectives.{name} ({type(objective).__name__}), step {self.step}")
            raise
        for term, value in noted.items():
            self._note(term, value)
        return loss

    def _weighted(self, sums: dict[str, Tensor], noted: set[str]) -> dict[str, Tensor]:
        """Losses by objective with their weights; balanced ones come after those that they match."""
        pulls: dict[str, Tensor] = {}
        for name in sorted(sums, key=lambda n: self.model.settings[n].balance is not None):  # a stable sort
            keys, loss = self.model.settings[name], sums[name]
            weight: float | Tensor = schedule.scale(keys) * schedule.ramp(keys, self.step, self.steps)
            if keys.balance is not None:
                anchor = balance.anchor_of(self.model, keys.balance.at)
                against = pulls[keys.balance.against]
                weight = weight * balance.ratio(loss, against, anchor, keys.balance, self.gradient)
            pulls[name] = loss * weight
            if name in noted:
                self._note(f"weight/{name}", weight)
        return pulls
