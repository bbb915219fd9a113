"""Bytes of one process by kind, of any engine: one that computes, or one that is only rehearsed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtp_core.engine import Engine
from vtp_core.nodes import Stage
from vtp_core.shards import local


@dataclass(slots=True)
class Memory:
    """Bytes of one process.

    Attributes:
        parameters: weights and buffers of all modules, frozen ones too.
        gradients: when the optimizers step.
        optimizer: moments and counters, critics' too.
        averages: the EMA teacher, and a generator's average.
        frozen: teachers, and networks that objectives hold.
        inputs: the batch.
        stages: most that autograd keeps at one time, by stage.
        rest: the same outside of stages: critics that look again.
        fetched: the largest part of a sharded module that is whole at one time.
        waiting: whole gradients of sharded modules that a later stage adds to.
        peak: most that the step's own tensors take at one time, before the optimizers step: gradients, what is kept,
            and what operators, recomputed blocks and collectives need in passing.
        gathered: what coupled losses gather from other processes; where it is kept, it is in the stage too.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    frozen: int = 0
    inputs: int = 0
    stages: dict[Stage, int] = field(default_factory=dict)
    rest: int = 0
    fetched: int = 0
    waiting: int = 0
    peak: int = 0
    gathered: int = 0

    @property
    def saved(self) -> int:
        """Most that autograd keeps at one time."""
        return max([*self.stages.values(), self.rest])

    @property
    def lasting(self) -> int:
        """What lives from step to step, and the batch."""
        return self.parameters + self.optimizer + self.averages + self.frozen + self.inputs

    @property
    def together(self) -> int:
        """Most at one time."""
        return self.lasting + self.peak


def weigh(engine: Engine, memory: Memory) -> None:
    """Note what lives from step to step."""
    modules = engine.model.modules().values()
    memory.parameters = size_of(t for m in modules for t in (*m.parameters(), *m.buffers()))
    memory.optimizer = size_of(t for o in optimizers_of(engine) for t in o.state().values())
    memory.averages = size_of(t for copies in (engine.ema, engine.average) for t in copies.state().values())
    teachers = engine.model.teachers.values()
    memory.frozen = size_of(t for m in teachers for t in (*m.parameters(), *m.buffers()))


@contextlib.contextmanager
def gradients_noted(
    engine: Engine, memory: Memory, first: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Inside, note gradients when an optimizer steps: they are dropped after.

    Args:
        engine: whose step is taken inside.
        memory: where they are noted.
        first: called when the engine's own optimizers begin.
    """

    def watched(optimizers: Any, step: Callable[[int], None]) -> Callable[[int], None]:
        def stepped(index: int) -> None:
            if optimizers is engine.optimizers:
                first()
            memory.gradients += size_of(p.grad for p in optimizers.parameters() if p.grad is not None)
            step(index)

        return stepped

    for optimizers in optimizers_of(engine):
        optimizers.step = watched(optimizers, optimizers.step)
    try:
        yield
    finally:
        for optimizers in optimizers_of(engine):
            del optimizers.step  # the class's own is found again


def optimizers_of(engine: Engine) -> Iterator[Any]:
    """The engine's own, and every critic's."""
    yield engine.optimizers
    yield from engine.critics.optimizers.values()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of tensors, each once."""
    found = {id(tensor): tensor for tensor in tensors}
    return sum(t.numel() * t.element_size() for t in map(local, found.values()))
