"""One step of any stack: losses see the parameters from before it, then every optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core import distributed, schedule, state
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.critics import Critics
from vtp_core.errors import NonFinite
from vtp_core.forwards import Forwards, Inputs
from vtp_core.hooks import manager_of
from vtp_core.layout import Layout
from vtp_core.losses import Losses
from vtp_core.nodes import Node, Plan
from vtp_core.optim import Optimizers
from vtp_core.options import Train
from vtp_core.planner import plan
from vtp_core.tally import Tally, finite
from vtp_core.teacher import EMATeacher, momentum_at
from vtp_plugins.needs import Need, Outputs

Norms = Mapping[str, Tensor]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


class Engine:
    """Modules, optimizers and the step that joins them.

    Args:
        model: built from a stack.
        train: the stack's ``train``.
        batch_size: global.
        device: where to compute.
        hooks: hook plugins, built.
        provided: outputs that the dataset supplies.

    Attributes:
        steps_done: optimizer steps taken.
        run_path: directory of the run, for hooks that write; None without one.
        last_runs: how often each node of the last micro-batch was computed.
    """

    def __init__(
        self,
        model: Model,
        train: Train,
        batch_size: int,
        device: torch.device | str = "cpu",
        hooks: Mapping[str, Any] | None = None,
        provided: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.train_keys = model, train
        self.device, self.dtype = torch.device(device), DTYPES[train.precision]
        self.world, self.rank = distributed.world_size(), distributed.rank()
        self.steps_done = 0
        self.run_path: Path | None = None
        self.layout = Layout(model, batch_size, self.world, train.accumulate, provided)
        self.plugins = manager_of(hooks or {})
        self._plans: dict[tuple[tuple[str, ...], frozenset[str]], Plan] = {}
        self._fresh_plans: dict[str, Plan] = {}
        self.last_runs: dict[Node, int] = {}
        self._place()
        self.plugins.hook.vtp_build(engine=self)
        self.critics = Critics(model, train.steps, train.max_grad_norm)
        self.optimizers = Optimizers(self.layout.owners(), self.layout.optim, train.steps)

    def _place(self) -> None:
        """Move modules to the device and make the EMA copies."""
        for module in [*self.model.modules().values(), *self.model.teachers.values()]:
            module.to(self.device, self.dtype)
        self.ema = EMATeacher(state.shadowed(self.model))
        state.bind_shadows(self.model, self.ema)
        self.average = EMATeacher(state.averaged(self.model))

    # ---- planning

    def active(self, step: int) -> tuple[str, ...]:
        """Objectives that take part in a step, in the stack's order."""
        steps = self.train_keys.steps
        return tuple(n for n, keys in self.model.settings.items() if schedule.is_active(keys, step, steps))

    def plan(self, names: tuple[str, ...] | None = None, watchers: frozenset[str] = frozenset()) -> Plan:
        """The plan for a set of objectives, by default of the coming step; plans are kept by that set.

        Args:
            names: objectives whose losses are taken.
            watchers: those of which only the critic reads.
        """
        if names is None:
            names, watchers = self.active(self.steps_done), self.critics.watching(self.steps_done)
        key = (names, watchers - set(names))
        if key not in self._plans:
            readers = tuple(n for n in self.model.objectives if n in names or n in watchers)
            self._plans[key] = plan(
                self.layout.readers(readers, key[1]), self._trains, self.layout.fields, self.layout.provided
            )
        return self._plans[key]

    def _trains(self, module: str) -> bool:
        found = self.model.modules().get(module)
        return found is not None and any(p.requires_grad for p in found.parameters())

    # ---- the step

    def step(self, inputs: Inputs) -> dict[str, float]:
        """One optimizer step on this process's batch.

        Returns:
            The row of ``metrics.jsonl`` without times: ``step``, ``loss``, ``objective/term``,
            ``weight/objective``, ``lr/group``, ``grad/group``.

        Raises:
            NonFinite: a loss or gradient is not finite; no weight has moved.
        """
        names, step_plan, micros = self.active(self.steps_done), self.plan(), self.train_keys.accumulate
        tally, clock = Tally(micros), self._clock(0)
        self.critics.begin(self.steps_done)
        losses = self._losses(tally, self.critics)
        for micro in range(micros):
            self._backward(step_plan, self.layout.micro(inputs, micro), self._clock(micro), losses)
        norms, waiting = self._norms(), self.critics.norms()
        row = {"step": self.steps_done, **self._checked(tally, norms, waiting, step_plan, inputs)}
        for name in (*names, *sorted(step_plan.watchers)):
            self.model.objectives[name].settle(clock.of(name))
        self.optimizers.clip(norms, self.train_keys.max_grad_norm)
        self.optimizers.step(self.steps_done)
        self.critics.step(waiting)
        with self.autocast():
            row |= self.critics.fresh(lambda *wanted: self._again(inputs, *wanted), micros)
        self.ema.update(momentum_at(clock.share, self.train_keys.teacher.momentum))
        self.average.update(self._decay(), buffers=True)
        row |= {f"lr/{owner}": rate for owner, rate in self.optimizers.rates(self.steps_done).items()}
        self.steps_done += 1
        self.plugins.hook.vtp_step_end(engine=self, clock=clock, metrics=row)
        return row

    def _decay(self) -> float:
        """Decay of the generator's average; every step counts from the generator's first."""
        keys = self.model.stack.generator.ema
        return 0.0 if keys is None else keys.at(self.steps_done)

    def _clock(self, micro: int) -> StepClock:
        return StepClock(
            self.train_keys.seed, self.steps_done, self.train_keys.steps, "", self.world, self.rank,
            micro, self.train_keys.accumulate, device=self.device,
        )  # fmt: skip

    def _losses(self, tally: Tally, critics: Critics | None = None, only: str | None = None) -> Losses:
        return Losses(self.model, self.steps_done, self.train_keys.steps, tally, critics, only)

    def forwards(self, step_plan: Plan, inputs: Inputs, clock: StepClock) -> Forwards:
        """The nodes of a plan over a micro-batch, with masks drawn."""
        inputs = Inputs(inputs.views, inputs.fields, self.layout.masks(inputs, clock, step_plan))
        return Forwards(
            self.model,
            self.ema.modules,
            step_plan,
            inputs,
            clock,
            self.plugins.hook,
            self.dtype,
            self.layout.crop_free,
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast on request."""
        if self.train_keys.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _backward(self, step_plan: Plan, inputs: Inputs, clock: StepClock, losses: Losses) -> None:
        """Forward, losses and backward of every stage, one stage after another."""
        run = self.forwards(step_plan, inputs, clock)
        for stage in step_plan.stages:
            if losses.only is not None and losses.only not in stage.readers:
                continue
            with self.autocast():
                total = losses.stage(run, stage)
            if total is not None and total.requires_grad:
                (total / self.train_keys.accumulate).backward()
            run.release(stage)
        self.last_runs = run.runs

    def _again(
        self, inputs: Inputs, name: str, needs: Mapping[str, Need], micro: int
    ) -> tuple[dict[str, Outputs], StepClock]:
        """What an objective reads, computed again without gradient, for a critic on fresh input."""
        if name not in self._fresh_plans:
            reader = replace(self.layout.reader(name, needs, (name,), learns=False), repeat=1)
            layout = self.layout
            self._fresh_plans[name] = plan([reader], lambda module: False, layout.fields, layout.provided)
        clock, fresh = self._clock(micro), self._fresh_plans[name]
        with torch.no_grad():
            run = self.forwards(fresh, self.layout.micro(inputs, micro), clock)
            return {slot: run.hand(handout) for slot, handout in fresh.handouts[name, 0].items()}, clock.of(
                name
            )

    # ---- the finite check

    def _norms(self) -> dict[str, Tensor]:
        distributed.average_gradients(self.optimizers.parameters())
        return self.optimizers.norms()

    def _checked(
        self, tally: Tally, norms: Norms, waiting: Mapping[str, Norms], step_plan: Plan, inputs: Inputs
    ) -> dict[str, float]:
        """Everything noted and all gradient norms in one read-back, if they are finite."""
        grads = {f"grad/{owner}": norm for owner, norm in norms.items()}
        grads |= {f"grad/{name}/critic": norm for name, own in waiting.items() for norm in own.values()}
        row = tally.read(grads)
        bad = [name for name, value in row.items() if not finite(value)]
        if bad:
            self._stop(bad, step_plan, inputs)
        return row

    def _stop(self, bad: list[str], step_plan: Plan, inputs: Inputs) -> None:
        """Undo what the step prepared and name the objective at fault."""
        self.optimizers.clear()
        self.critics.undo()
        named = [n for n in bad if n != "loss" and not n.startswith(("grad/", "weight/"))]
        named = named or [f"{n.split('/')[1]} (gradient of its critic)" for n in bad if n.endswith("/critic")]
        named = named or self._blame(step_plan, inputs) or bad
        for objective in self.model.objectives.values():
            objective.pending.clear()
        culprit = named[0].partition("/")[0].partition(" ")[0]
        raise NonFinite(
            f"step {self.steps_done}: not finite: {', '.join(named)}; no weight has moved. "
            f"Lower train.optim.lr or the weight of {culprit!r}, then resume from the last checkpoint"
        )

    def _blame(self, step_plan: Plan, inputs: Inputs) -> list[str]:
        """Objectives whose gradient alone is not finite: draws are keyed, so the step can be repeated."""
        found = []
        for name in self.active(self.steps_done):
            losses = self._losses(Tally(), only=name)
            for micro in range(self.train_keys.accumulate):
                self._backward(step_plan, self.layout.micro(inputs, micro), self._clock(micro), losses)
            if not all(map(finite, Tally().read(self._norms()).values())):
                found.append(f"{name} (gradient)")
            self.optimizers.clear()
        return found

    # ---- state

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by part, not copied; with ``steps_done`` they are everything that a resumed run needs."""
        parts = state.module_state(self.model)
        parts["teacher"] = self.ema.state()
        if self.average.modules:
            parts["generator.ema"] = self.average.state()
        parts["optimizer"] = self.optimizers.state()
        return parts | self.critics.state()

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """The inverse of :meth:`state`."""
        state.load_modules(self.model, parts)
        self.ema.load(parts.get("teacher", {}))
        self.average.load(parts.get("generator.ema", {}))
        self.optimizers.load(parts.get("optimizer", {}))
        self.critics.load(parts)
        self.steps_done = step
