"""Whether an objective means the same however its batch is split over processes and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vtp_plugins.comparisons import gradients, near
from vtp_plugins.fakes import FakeBatch, FakeClock, Meeting
from vtp_plugins.needs import Outputs
from vtp_plugins.objective import AdversarialObjective, Objective
from vtp_plugins.spec import Spec

Fail = Callable[[str], None]
Terms = dict[str, Tensor]
_COUNTS = {1: "one", 2: "two", 4: "four"}


@dataclass(frozen=True)
class Split:
    """So many processes with so many micro-batches each."""

    world: int = 1
    micros: int = 1

    def __str__(self) -> str:
        processes, parts = f"{_COUNTS[self.world]} processes", f"{_COUNTS[self.micros]} micro-batches"
        if self.micros == 1:
            return processes
        return parts if self.world == 1 else f"{processes} with {parts}"

    def clocks(self, meeting: Meeting) -> list[FakeClock]:
        """Of each process's first micro-batch."""
        return [FakeClock(rank=rank, meeting=meeting, micros=self.micros) for rank in range(self.world)]


SPLITS = (Split(2), Split(4), Split(1, 4), Split(2, 2))
GATHER = (
    "return a scalar whose mean over processes is the whole batch's loss: sum * clock.world / "
    "clock.total(count), or gather the rows and set self.coupled = True"
)
COUPLE = (
    "return a mean over rows; where rows weigh by what the others have, as by a count that varies, set "
    "self.coupled = True"
)


def check_splits(make: Callable[[], Objective], spec: Spec, rows: int, fail: Fail) -> None:
    """Losses, gradients and settled state of any split are those of one process with the whole batch.

    Micro-batches are asked of objectives that are not ``coupled``. Where there are masks, all holds too when
    every second row has ten times as many masked places.

    Args:
        make: gives an objective with its EMA copies, the same each time.
        spec: shapes.
        rows: of the whole batch.
        fail: raises, with a message.
    """
    objective = make()
    for uneven in (False, True)[: 1 + bool(objective.masks)]:
        batch = FakeBatch(objective, spec, rows, torch.float64, uneven)
        batch.got(FakeClock())  # made before threads start
        whole = _Run(make, batch, Split())
        for split in SPLITS:
            if split.micros == 1 or not objective.coupled:
                _Run(make, batch, split).compare(whole, fail)


def check_masks(batch: FakeBatch, fail: Fail) -> None:
    """Samplers draw for the whole batch, so that a row meets its mask on any process."""
    for name in batch.objective.masks:
        whole = batch.sampled(name, FakeClock())
        for split in SPLITS[:2]:
            for rank, clock in enumerate(split.clocks(Meeting(split.world))):
                part = batch.sampled(name, clock)
                if part.dtype != torch.bool or not torch.equal(part, whole[:, rank :: split.world]):
                    fail(f"mask {name!r} of {split} is not that of one, dealt; key it by clock.positions")


class _Part(NamedTuple):
    """Terms of one micro-batch of one process."""

    terms: Terms
    critic: Terms


class _Run:
    """What an objective gives over a batch that is split, and the state that it settles."""

    def __init__(self, make: Callable[[], Objective], batch: FakeBatch, split: Split) -> None:
        self.batch, self.split, self.meeting = batch, split, Meeting(split.world)
        self.objectives = [make() for _ in range(split.world)]
        self.critics = [o.critic for o in self.objectives if isinstance(o, AdversarialObjective)]
        self.trained = [[p for p in critic.parameters() if p.requires_grad] for critic in self.critics]
        self._train(False)
        clocks = split.clocks(self.meeting)
        parts = [part for own in self.meeting.run(lambda rank: self._process(clocks[rank])) for part in own]
        self.terms = _means([part.terms for part in parts])
        self.terms |= {f"critic_{name}": mean for name, mean in _means([p.critic for p in parts]).items()}
        self.gradients = gradients([part.terms for part in parts], self.objectives, batch.learning())
        if self.critics:
            self._train(True)
            found = gradients([part.critic for part in parts], self.critics)
            self.gradients |= {f"critic.{name} in critique": grad for name, grad in found.items()}
        self.meeting.run(lambda rank: self.objectives[rank].settle(clocks[rank]))

    def _train(self, on: bool, rank: int | None = None) -> None:
        for parameters in self.trained if rank is None else self.trained[rank : rank + 1]:
            for parameter in parameters:
                parameter.requires_grad_(on)

    def _process(self, first: FakeClock) -> list[_Part]:
        objective, found = self.objectives[first.rank], []
        for micro in range(self.split.micros):
            clock = replace(first, micro=micro)
            got = self.batch.got(clock)
            terms, critic = objective(got, clock), {}
            if isinstance(objective, AdversarialObjective):
                self._train(True, first.rank)
                critic = objective.critique({slot: _cut(outputs) for slot, outputs in got.items()}, clock)
                self._train(False, first.rank)
            found.append(_Part(terms, critic))
        return found

    def compare(self, whole: _Run, fail: Fail) -> None:
        """Hold all of it against one process with the whole batch."""
        coupled = self.objectives[0].coupled
        if self.meeting.used and not coupled:
            fail("forward gathers rows, so the loss couples them; set self.coupled = True")
        remedy = GATHER if self.split.micros == 1 else COUPLE
        for term, value in whole.terms.items():
            if not near(self.terms[term], value):
                fail(f"term {term!r} of {self.split} does not average to that of one; {remedy}")
        for key, grad in whole.gradients.items():
            if not near(self.gradients[key], grad):
                fail(f"the gradient of {key} on {self.split} is not that on one; {remedy}")
        once = "merge clock.total() of pending" if self.split.micros == 1 else "add to pending, don't replace"
        for objective in self.objectives:
            for key, value in objective.state_dict().items():
                if not near(value, whole.objectives[0].state_dict()[key]):
                    fail(f"{key!r} settles differently on {self.split}; {once}")


def _means(terms: list[Terms]) -> Terms:
    return {name: torch.stack([one[name].detach() for one in terms]).mean() for name in terms[0]}


def _cut(outputs: Outputs) -> Outputs:
    values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.values.items()}
    return Outputs(values, outputs.mask, outputs.grid)
