"""What tests of objectives share: processes that are threads, and distances from stored values."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core.clock import StepClock


@dataclass
class Meeting:
    """Where the ranks of one run leave their tensors for each other."""

    world: int
    barrier: threading.Barrier = field(init=False)
    left: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world, timeout=20)
        self.left = [torch.empty(0)] * self.world

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.left[rank] = x
        self.barrier.wait()
        everyone = list(self.left)
        self.barrier.wait()
        return everyone


class RankClock(StepClock):
    """A clock whose collectives join the graphs of all ranks.

    The backward of the mean of the ranks' losses then is what averaged gradients of real processes are.
    """

    __slots__ = ("meeting",)
    meeting: Meeting

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x))

    def total(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """``ranks(world, work)`` runs ``work(clock)`` on every rank at once and gives what they returned."""

    def run(world: int, work: Callable[[StepClock], Any]) -> list[Any]:
        meeting = Meeting(world)

        def one(rank: int) -> Any:
            clock = RankClock(steps=100, world=world, rank=rank)
            object.__setattr__(clock, "meeting", meeting)
            return work(clock)

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    return run


@pytest.fixture
def off() -> Callable[[Tensor, Tensor], float]:
    """``off(ours, stored)``: distance over the stored tensor's norm, in float64."""

    def distance(ours: Tensor, stored: Tensor) -> float:
        ours, stored = ours.detach().double(), stored.detach().double().reshape(ours.shape)
        return float((ours - stored).norm() / stored.norm().clamp(min=1e-12))

    return distance
