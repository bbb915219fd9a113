"""One step of the real engine on tensors without values, as the first of any number of processes takes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vtp_core import schedule
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.dryrun.imagined import CPU, VALUES, Copying, Imagined
from vtp_core.dryrun.live import Live
from vtp_core.dryrun.memory import Memory, gradients_noted, size_of, weigh
from vtp_core.dryrun.notes import Notes
from vtp_core.dryrun.saved import Saved
from vtp_core.engine import Engine
from vtp_core.forwards import Forwards, Inputs
from vtp_core.nodes import Node, Plan, Reader, Stage
from vtp_core.options import steps_of
from vtp_core.peers import PULSE
from vtp_core.planner import plan
from vtp_plugins.objective import AdversarialObjective

META = torch.device("meta")


class LeftOut(Exception):
    """Somebody looks at values, and so cannot be rehearsed.

    Attributes:
        who: an objective's name, or a node.
    """

    def __init__(self, who: Node | str, reason: str) -> None:
        super().__init__(reason)
        self.who = who


class Rehearsal(Engine):
    """An engine whose tensors have no values.

    Args:
        model: built on the meta device.
        train: the stack's ``train``.
        batch_size: global.
        provided: outputs that the dataset supplies.
        left_out: objectives that do not take part.

    Attributes:
        notes: FLOPs and collectives.
        memory: by kind.
    """

    def __init__(
        self, model: Model, train: Any, batch_size: int, provided: frozenset[str],
        left_out: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.imagined = Imagined()
        with self.imagined, Copying(self.imagined):
            super().__init__(model, train, batch_size, CPU, provided=provided)
        for name in left_out:
            self.critics.adversaries.pop(name, None)
            self.critics.keys.pop(name, None)
        self.left_out = frozenset(left_out)
        self.memory = Memory()
        self._listen(Notes())
        # The engine reads what it would log; whatever reads a value that decides a size is refused.
        self.imagined.answer = lambda: 1.0 if self.notes.owner is None else None
        self.saved = Saved(self.imagined.outside, lambda: self.notes.owner)
        self.live = Live(self.imagined.outside)
        self.imagined.made = self.live.born
        self.steps_done = full_step(model, train.steps)
        self._watch()

    def _listen(self, notes: Notes) -> None:
        self.notes = notes
        self.imagined.counted, self.imagined.sent = notes.counted, notes.sent
        self.imagined.bounded = notes.picked

    def _move(self) -> None:
        modules = [*self.model.modules().values(), *self.model.teachers.values()]
        with _disable_current_modes():
            for module in modules:
                module.to(META, self.dtype)
        self.imagined.take(_unique(t for m in modules for t in (*m.parameters(), *m.buffers())))

    def _watch(self) -> None:
        """Note who computes what, and gradients before they are dropped."""
        masks = self.layout.masks
        self.layout.masks = _with_values(masks)  # type: ignore[method-assign]
        for name, objective in self.model.objectives.items():
            objective.forward = self._noted(name, objective.forward)  # type: ignore[method-assign]
            if isinstance(objective, AdversarialObjective):
                objective.critique = self._noted(name, objective.critique)  # type: ignore[method-assign]

    def _noted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **keys: Any) -> Any:
            with self.notes.of(name):
                return call(*args, **keys)

        return noted

    # ---- the step

    def active(self, step: int) -> tuple[str, ...]:
        return tuple(name for name in super().active(step) if name not in self.left_out)

    def forwards(self, step_plan: Plan, inputs: Inputs, clock: StepClock) -> Forwards:
        run = super().forwards(step_plan, inputs, clock)
        value, release = run.value, run.release

        def noted(node: Any) -> dict[str, Any]:
            if node in run.values:
                return run.values[node]
            with self.notes.of(node):
                return value(node)

        def released(stage: Stage) -> None:
            release(stage)
            most = self.memory.stages
            most[stage] = max(most.get(stage, 0), self.saved.restart())
            self.memory.waiting = max(self.memory.waiting, self._whole_gradients())

        run.value, run.release = noted, released  # type: ignore[method-assign]
        return run

    def _whole_gradients(self) -> int:
        roots, waiting = self.sharding.roots, self.sharding._waiting
        trained = [p for name in waiting for p in roots[name].parameters() if p.requires_grad]
        return sum(p.numel() * p.element_size() for p in trained)

    def rehearse(self, inputs: Inputs) -> None:
        """Take the step.

        Raises:
            LeftOut: an objective cannot be computed without values, or a node looks at them.
        """
        pulse = PULSE.collectives
        try:
            noted = gradients_noted(self, self.memory, self.live.stop)
            with self.imagined, self.saved, self.live.resized(), noted:
                self.step(inputs)
        except (RuntimeError, NotImplementedError) as error:
            who = self.notes.failed
            if isinstance(who, str) or (who is not None and isinstance(error, VALUES)):
                raise LeftOut(who, str(error).splitlines()[0]) from error
            raise
        finally:
            PULSE.collectives = pulse  # nothing was sent
        self._weigh(inputs)

    def alone(self, inputs: Inputs) -> tuple[int, int]:
        """FLOPs and encoder forwards of all needs if each ran forwards of its own."""
        notes, encodes = self.notes, 0
        self._listen(Notes())
        micro = self.layout.micro(inputs, 0)
        with self.imagined, torch.no_grad():
            for reader in self.layout.readers(self.active(self.steps_done)):
                for slot, need in reader.needs.items():
                    lone = Reader(reader.name, {slot: need}, reader.rows)
                    single = plan([lone], self._trains, self.layout.fields, self.layout.provided)
                    run = self.forwards(single, micro, self._clock(0))
                    for node in single.demands:
                        run.value(node)
                    encodes += sum(node.kind == "encode" for node in single.demands)
        found = self.notes
        self._listen(notes)
        return sum(found.flops.values()) * self.train_keys.accumulate, encodes

    def _weigh(self, inputs: Inputs) -> None:
        """Bytes of everything that lives from step to step."""
        memory = self.memory
        weigh(self, memory)
        memory.rest, memory.peak = self.saved.peak, self.live.peak
        memory.inputs = size_of(t for t in (*inputs.views.values(), *inputs.fields.values()))
        memory.frozen += self.imagined.held
        fetches = [c.size for c in self.notes.collectives if c.kind == "all_gather" and c.cause == "shards"]
        memory.fetched = max(fetches, default=0)
        gathers = [c for c in self.notes.collectives if c.kind == "all_gather" and c.cause == "losses"]
        memory.gathered = sum(c.size for c in gathers)


def _with_values(masks: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Masks are drawn on the CPU, from keys alone, so they can be real."""

    def drawn(*args: Any) -> dict[str, Tensor]:
        with _disable_current_modes():
            return masks(*args)

    return drawn


def full_step(model: Model, steps: int) -> int:
    """The first step in which most objectives and critics have their turn."""
    keys = model.settings
    critics = [n for n, o in model.objectives.items() if isinstance(o, AdversarialObjective)]
    starts = {steps_of(k.start, steps) for k in keys.values()}
    starts |= {steps_of(s, steps) for n in critics if (s := keys[n].critic.start) is not None}
    cycle = min(math.lcm(*(k.every for k in keys.values())), 64)

    def turns(step: int) -> int:
        own = sum(schedule.is_active(k, step, steps) for k in keys.values())
        return own + sum(schedule.is_active(keys[n], step, steps, keys[n].critic.start) for n in critics)

    return max(sorted({min(s + i, steps - 1) for s in starts for i in range(cycle)}), key=turns, default=0)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
