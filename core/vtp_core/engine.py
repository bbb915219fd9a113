"""One step of any stack: losses see the parameters from before it, then every optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core import distributed, nonfinite, schedule, state
from vtp_core.build import Model
from vtp_core.cached import Micros, whole_batch
from vtp_core.clock import StepClock
from vtp_core.critics import Critics
from vtp_core.forwards import Forwards, Inputs
from vtp_core.hooks import manager_of
from vtp_core.layout import Layout
from vtp_core.losses import Losses
from vtp_core.nodes import Node, Plan
from vtp_core.optim import Optimizers
from vtp_core.options import Train
from vtp_core.planner import plan
from vtp_core.recomputing import recompute
from vtp_core.sharding import Sharding
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
        sample_name: of a dataset's index, where the dataset names samples; for messages.
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
        self.sample_name: Callable[[int], str | None] = lambda index: None
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
        """Move modules to the device, make the EMA copies, and deal both over processes if that is wanted."""
        self._move()
        self.ema = EMATeacher(state.shadowed(self.model))
        self.average = EMATeacher(state.averaged(self.model))
        if self.train_keys.activation_checkpointing:
            recompute(self.model.modules().values())
        self.sharding = Sharding(self.model, self.ema, self.average, self.train_keys, self.device)
        state.bind_shadows(self.model, self.ema)

    def _move(self) -> None:
        for module in [*self.model.modules().values(), *self.model.teachers.values()]:
            module.to(self.device, self.dtype)

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
        losses = self.losses(tally, self.critics)
        self.pull(step_plan, inputs, losses)
        norms, waiting = self.norms(), self.critics.norms()
        row = {"step": self.steps_done, **self._checked(tally, norms, waiting, step_plan, inputs)}
        for name in (*names, *sorted(step_plan.watchers)):
            self.model.objectives[name].settle(clock.of(name))
        self.optimizers.clip(norms, self.train_keys.max_grad_norm)
        self.optimizers.step(self.steps_done)
        self.critics.step(waiting)
        with self.autocast(), nonfinite.late(self, inputs):
            row |= self.critics.fresh(lambda *wanted: self._again(inputs, *wanted), micros)
        self.ema.update(momentum_at(clock.share, self.train_keys.teacher.momentum))
        self.average.update(self._decay(), buffers=True)
        self.sharding.rest()
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

    def losses(self, tally: Tally, critics: Critics | None = None, only: str | None = None) -> Losses:
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

    def pull(self, step_plan: Plan, inputs: Inputs, losses: Losses) -> None:
        """Gradients of all micro-batches; where one cannot be taken by itself, in two passes."""
        layout, count = self.layout, self.train_keys.accumulate

        def forwards(some: Plan, micro: int) -> Forwards:
            return self.forwards(some, layout.micro(inputs, micro), self._clock(micro))

        whole = whole_batch(self.model) & {name for name, _ in step_plan.handouts}
        if count > 1 and whole:
            clock = replace(self._clock(0), micros=1)
            micros = Micros(step_plan, count, clock, forwards, self.autocast, self.sharding)
            self.last_runs = micros.backward(losses, whole)
            return
        for micro in range(count):
            self._backward(step_plan, layout.micro(inputs, micro), self._clock(micro), losses)

    def _backward(self, step_plan: Plan, inputs: Inputs, clock: StepClock, losses: Losses) -> None:
        """Forward, losses and backward of every stage, one stage after another."""
        run = self.forwards(step_plan, inputs, clock)
        stages = [stage for stage in step_plan.stages if losses.only in (None, *stage.readers)]
        lasts = self.sharding.lasts(stages, clock.micro + 1 == clock.micros)
        for stage, done in zip(stages, lasts, strict=True):
            with self.autocast():
                total = losses.stage(run, stage)
            own = [total / self.train_keys.accumulate] if total is not None and total.requires_grad else []
            self.sharding.backward(own, done)
            run.release(stage)
            self.sharding.close()
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

    def norms(self) -> dict[str, Tensor]:
        """Gradient norms by owner, once gradients are averaged over processes."""
        self.sharding.settle()
        self.optimizers.average()
        return self.optimizers.norms()

    def _checked(
        self, tally: Tally, norms: Norms, waiting: Mapping[str, Norms], step_plan: Plan, inputs: Inputs
    ) -> dict[str, float]:
        """Everything noted and all gradient norms in one read-back, if they are finite."""
        grads = {f"grad/{owner}": norm for owner, norm in norms.items()}
        grads |= {f"grad/{name}/critic": norm for name, own in waiting.items() for norm in own.values()}
        row = tally.read(grads)
        if not all(map(finite, row.values())):
            nonfinite.stop(self, row, tally, step_plan, inputs)
        return row

    # ---- state

    @contextlib.contextmanager
    def whole(self) -> Iterator[tuple[Model, nn.Module | None]]:
        """The model and its generator's average with all weights on this process; every process must call this."""
        if self.sharding.plain is None:
            yield self.model, self.average.modules.get("generator")
        else:
            with self.sharding.plain.filled() as found:
                yield found

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
