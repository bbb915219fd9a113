"""The engine: one step of any stack. Losses see the parameters from before the step; then every optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core import balance, distributed, schedule, state
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.critics import Critics
from vtp_core.errors import NonFinite
from vtp_core.forwards import Forwards, Inputs
from vtp_core.hooks import manager_of
from vtp_core.layout import Layout, checked_terms
from vtp_core.optim import Optimizers
from vtp_core.options import Train
from vtp_core.planner import Plan, Stage, plan
from vtp_core.teacher import EMATeacher, momentum_at
from vtp_plugins.needs import Need

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
        self.layout = Layout(model, batch_size, self.world, train.accumulate, provided)
        self.plugins = manager_of(hooks or {})
        self._plans: dict[tuple[str, ...], Plan] = {}
        self.last_runs: dict[Any, int] = {}
        self._place()
        self.plugins.hook.vtp_build(engine=self)
        self.critics = Critics(model, train.steps)
        self.optimizers = Optimizers(self.layout.owners(), self.layout.optim, train.steps)

    def _place(self) -> None:
        """Move modules to the device and make the EMA copies."""
        for module in [*self.model.modules().values(), *self.model.teachers.values()]:
            module.to(self.device, self.dtype)
        self.ema = EMATeacher(state.shadowed(self.model))
        state.bind_shadows(self.model, self.ema)
        for module in self.model.modules().values():
            module.train()

    # ---- planning

    def active(self, step: int) -> tuple[str, ...]:
        """Objectives that take part in a step, in the stack's order."""
        steps = self.train_keys.steps
        return tuple(n for n, keys in self.model.settings.items() if schedule.is_active(keys, step, steps))

    def plan(self, names: tuple[str, ...] | None = None) -> Plan:
        """The plan for a set of objectives; plans are kept by that set."""
        names = self.active(self.steps_done) if names is None else names
        if names not in self._plans:
            readers = self.layout.readers(names)
            self._plans[names] = plan(readers, self._trains, self.layout.fields, self.layout.provided)
        return self._plans[names]

    def plan_of(self, needs: Mapping[str, Mapping[str, Need]]) -> Plan:
        """The plan for given needs by objective, outside the step's own."""
        names = tuple(needs)
        readers = [self.layout.reader(name, slots, names) for name, slots in needs.items()]
        return plan(readers, self._trains, self.layout.fields, self.layout.provided)

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
        names = self.active(self.steps_done)
        self.critics.begin(self.steps_done)
        losses: dict[str, Tensor] = {}
        for micro in range(self.train_keys.accumulate):
            part, clock = self.layout.micro(inputs, micro), self._clock(micro)
            self._backward(self.plan(names), part, clock, losses)
        clock = self._clock(0)
        row = self._checked(losses, inputs)
        for name in names:
            self.model.objectives[name].settle(clock.of(name))
        self.optimizers.step(self.steps_done)
        self.critics.step()
        row |= self.critics.fresh(self, inputs, clock)
        self.ema.update(momentum_at(clock.share, self.train_keys.teacher.momentum))
        self.steps_done += 1
        self.plugins.hook.vtp_step_end(engine=self, clock=clock, metrics=row)
        return row

    def _clock(self, micro: int) -> StepClock:
        return StepClock(
            self.train_keys.seed, self.steps_done, self.train_keys.steps, "", self.world, self.rank,
            micro, self.train_keys.accumulate, device=self.device,
        )  # fmt: skip

    def forwards(self, step_plan: Plan, inputs: Inputs, clock: StepClock) -> Forwards:
        """The nodes of a plan over a batch, with masks drawn."""
        inputs = Inputs(inputs.views, inputs.fields, self.layout.masks(inputs, clock))
        return Forwards(
            self.model, self.ema.modules, step_plan, inputs, clock, self.plugins.hook, self.dtype, self.layout.crop_free
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast on request."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.train_keys.precision == "bfloat16")

    def _backward(self, step_plan: Plan, inputs: Inputs, clock: StepClock, losses: dict[str, Tensor]) -> None:
        """Forward, losses and backward of every stage, one stage after another."""
        with self.autocast():
            run = self.forwards(step_plan, inputs, clock)
        for index, stage in enumerate(step_plan.stages):
            with self.autocast():
                total = self._stage(run, stage, clock, losses)
            if total is not None and total.requires_grad:
                (total / self.train_keys.accumulate).backward()
            run.release(_kept(step_plan, index))
        self.last_runs = run.runs

    def _stage(self, run: Forwards, stage: Stage, clock: StepClock, losses: dict[str, Tensor]) -> Tensor | None:
        """The stage's weighted loss; terms and weights are noted in ``losses``."""
        sums: dict[str, Tensor] = {}
        for name in stage.readers:
            sums[name] = self._objective(run, name, clock, losses)
        total: Tensor | None = None
        for name, value in sums.items():
            keys = self.model.settings[name]
            scale: float | Tensor = schedule.ramp(keys, self.steps_done, self.train_keys.steps)
            if keys.balance is not None:
                anchor = balance.anchor_of(self.model, keys.balance.at)
                scale = scale * balance.ratio(value, sums[keys.balance.against], anchor, keys.balance)
            _note(losses, f"weight/{name}", torch.as_tensor(_factor(keys.weight) * scale), self.train_keys.accumulate)
            part = value * scale
            total = part if total is None else total + part
        if total is not None:
            _note(losses, "loss", total, self.train_keys.accumulate)
        return total

    def _objective(self, run: Forwards, name: str, clock: StepClock, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of an objective's terms over its evaluations."""
        objective, keys = self.model.objectives[name], self.model.settings[name]
        total: Tensor | None = None
        for turn in range(keys.repeat):
            slots = run.plan.handouts[name, turn]
            got = {slot: run.hand(handout) for slot, handout in slots.items()}
            own = clock.of(name if keys.repeat == 1 else f"{name}#{turn}")
            noted = self.critics.turn(name, got, own, "before")
            terms = checked_terms(name, objective(got, own))
            noted |= {f"{name}/{term}": value for term, value in terms.items()}
            noted |= self.critics.turn(name, got, own, "after")
            for term, value in noted.items():
                _note(losses, term, value, self.train_keys.accumulate)
            value = schedule.weighted(name, keys, terms)
            total = value if total is None else total + value
        assert total is not None
        return total

    # ---- the finite check

    def _checked(self, losses: dict[str, Tensor], inputs: Inputs) -> dict[str, float]:
        """Average gradients, check everything in one read-back, clip; returns the row."""
        parameters = self.optimizers.parameters()
        distributed.average_gradients(parameters)
        norms = self.optimizers.norms()
        numbers = {**losses, **{f"grad/{owner}": norm for owner, norm in norms.items()}}
        stacked = torch.stack([v.detach().to(self.device, torch.float64) for v in numbers.values()])
        values = distributed.mean_over_processes(stacked).tolist() if numbers else []
        row = dict(zip(numbers, values, strict=True))
        bad = [name for name, value in row.items() if not _finite(value)]
        if bad:
            self._stop(bad, inputs)
        self._clip(norms)
        return {"step": self.steps_done, **row, **{f"lr/{k}": v for k, v in self.optimizers.rates(self.steps_done).items()}}

    def _clip(self, norms: Mapping[str, Tensor]) -> None:
        limit = self.train_keys.max_grad_norm
        if limit is None or not norms:
            return
        whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        scale = (limit / (whole + 1e-6)).clamp(max=1.0)
        grads = [p.grad for p in self.optimizers.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))

    def _stop(self, bad: list[str], inputs: Inputs) -> None:
        """Undo what the step prepared and name the objective at fault."""
        self.optimizers.clear()
        self.critics.undo()
        for objective in self.model.objectives.values():
            objective.pending.clear()
        terms = [n for n in bad if not n.startswith(("grad/", "weight/")) and n != "loss"]
        named = terms or self._blame(inputs) or bad
        raise NonFinite(
            f"step {self.steps_done}: not finite: {', '.join(named)}; no weight has moved. "
            f"Lower train.optim.lr or the weight of {named[0].partition('/')[0]!r}, then resume from the last checkpoint"
        )

    def _blame(self, inputs: Inputs) -> list[str]:
        """Objectives whose gradient alone is not finite: draws are keyed, so the step can be repeated."""
        found = []
        for name in self.active(self.steps_done):
            self._backward(self.plan((name,)), self.layout.micro(inputs, 0), self._clock(0), {})
            if not all(_finite(float(norm)) for norm in self.optimizers.norms().values()):
                found.append(f"{name} (gradient)")
            self.optimizers.clear()
        return found

    # ---- state

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by part; with ``steps_done`` they are everything that a resumed run needs."""
        parts = state.module_state(self.model)
        parts["teacher"] = self.ema.state()
        parts["optimizer"] = self.optimizers.state()
        return parts | self.critics.state()

    def load(self, parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """The inverse of :meth:`state`."""
        state.load_modules(self.model, parts)
        self.ema.load(parts["teacher"])
        self.optimizers.load(parts["optimizer"])
        self.critics.load(parts)
        self.steps_done = step


def _kept(step_plan: Plan, index: int) -> frozenset[Any]:
    """Nodes that stages after ``index`` read."""
    kept = set()
    for stage in step_plan.stages[index + 1 :]:
        for (reader, _), slots in step_plan.handouts.items():
            if reader in stage.readers:
                kept |= {node for handout in slots.values() for node in handout.outputs.values()}
    for node in list(kept):
        while node.reads is not None:
            node = node.reads
            kept.add(node)
    return frozenset(kept)


def _note(losses: dict[str, Tensor], name: str, value: Tensor, micros: int) -> None:
    noted = value.detach().float() / micros
    losses[name] = losses[name] + noted if name in losses else noted


def _factor(weight: float | dict[str, float]) -> float:
    return weight if isinstance(weight, float | int) else 1.0


def _finite(value: float) -> bool:
    return value - value == 0.0

