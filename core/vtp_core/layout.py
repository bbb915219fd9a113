"""Static facts of a model for the engine: who owns which parameters, who reads how many rows, which masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.critics import critic_parameters
from vtp_core.errors import PluginFault, StackFault, suggestion
from vtp_core.inputs import Inputs
from vtp_core.options import Optim, steps_of
from vtp_core.planner import Plan, Reader, family, plan
from vtp_core.rows import rows_of
from vtp_plugins.needs import Need
from vtp_plugins.objective import AdversarialObjective


class Layout:
    """What follows from a model, a batch size and the number of processes.

    Args:
        model: built.
        batch_size: global.
        world: processes.
        accumulate: micro-batches per step.
        provided: outputs that the dataset supplies.

    Raises:
        StackFault: a sub-batch that does not divide, a view or mask nobody defines, a coupled critic on
            fresh input with accumulation.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        world: int = 1,
        accumulate: int = 1,
        provided: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.batch_size, self.world, self.accumulate = model, batch_size, world, accumulate
        self.provided = provided
        shares = {name: keys.rows for name, keys in model.settings.items()}
        self.rows = rows_of(shares, batch_size, world, accumulate)
        self.samplers = self._samplers()
        needs = [need for objective in model.objectives.values() for need in objective.needs.values()]
        condition = {model.condition} if model.condition else set()
        raw = {need.view for need in needs} | condition
        self.fields = frozenset(raw - set(model.views)) | provided
        self.crop_free = frozenset(name for name, view in model.views.items() if view.crops is None)
        self._check()
        self.optim = {owner: self._optim(owner) for owner in model.modules()}

    def _samplers(self) -> dict[str, Any]:
        """Mask samplers by name; equal definitions merge."""
        found: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for name, objective in self.model.objectives.items():
            for mask, sampler in objective.masks.items():
                if mask in found and found[mask] != sampler:
                    raise StackFault(
                        f"mask {mask!r} is defined differently by objectives.{owners[mask]} and "
                        f"objectives.{name}; give both the same options"
                    )
                found[mask] = sampler
                owners.setdefault(mask, name)
        return found

    # ---- checks

    def _check(self) -> None:
        for name, objective in self.model.objectives.items():
            key = f"objectives.{name}"
            if not objective.needs:
                raise PluginFault(f"{key}: {type(objective).__name__} declares no needs")
            self._check_balance(name)
            self._check_critic(name)
            for need in objective.needs.values():
                self._check_need(key, need)

    def _check_need(self, key: str, need: Need) -> None:
        masks = {output.partition("@")[2] for output in need.want if "@" in output}
        masks |= {need.mask} if need.mask is not None and need.mask != "any" else set()
        for mask in sorted(masks):
            if mask not in self.samplers:
                raise StackFault(
                    f"{key}: no objective brings a mask {mask!r}{suggestion(mask, self.samplers)}"
                )
        self._check_depth(key, need)
        teachers = self.model.teachers
        if need.source.startswith("teacher:") and need.source[8:] not in teachers:
            raise StackFault(
                f"{key}: no {need.source[8:]!r} under 'teachers'{suggestion(need.source[8:], teachers)}"
            )
        supplied = need.view in self.provided or "latent" in self.provided
        kinds = {family(output) for output in need.want} - {"input"}
        if kinds and need.view not in self.model.views and not (supplied and not kinds & {"cls", "patches"}):
            raise StackFault(f"{key}: no view {need.view!r}{suggestion(need.view, self.model.views)}")

    def _check_depth(self, key: str, need: Need) -> None:
        """``hidden:k`` must be a block that there is."""
        module = self.model.generator if need.source == "generator" else self.model.encoder
        depth = getattr(module, "depth", None)
        for output in need.want if depth and not need.source.startswith("teacher:") else ():
            block = output.removeprefix("hidden:")
            if block != output and block.isdigit() and not 1 <= int(block) <= int(depth or 0):
                what = "generator" if need.source == "generator" else "encoder"
                raise StackFault(f"{key}: it reads {output}, and the {what} has blocks 1 to {depth}")

    def _check_balance(self, name: str) -> None:
        """The reference must exist, weigh by itself, and be active whenever the balanced objective is."""
        keys, steps = self.model.settings[name], self.model.stack.train.steps
        if keys.balance is None:
            return
        key, against = f"objectives.{name}.balance.against", keys.balance.against
        if against not in self.model.objectives or against == name:
            raise StackFault(
                f"{key}: no other objective {against!r}"
                f"{suggestion(against, set(self.model.objectives) - {name})}"
            )
        other = self.model.settings[against]
        if other.balance is not None:
            raise StackFault(
                f"{key}: {against!r} is balanced itself; name an objective whose weight is fixed"
            )
        first, first_other = steps_of(keys.start, steps), steps_of(other.start, steps)
        last, last_other = (steps if k.stop is None else steps_of(k.stop, steps) for k in (keys, other))
        in_time = first >= first_other and min(last, steps) <= last_other
        if not in_time or keys.every % other.every or (first - first_other) % other.every:
            raise StackFault(
                f"{key}: {against!r} rests at steps when {name!r} is active; align start, stop and every"
            )

    def _check_critic(self, name: str) -> None:
        keys, adversarial = (
            self.model.settings[name],
            isinstance(self.model.objectives[name], AdversarialObjective),
        )
        if not adversarial and "critic" in keys.model_fields_set:
            raise StackFault(
                f"objectives.{name}.critic: {type(self.model.objectives[name]).__name__} has no critic"
            )
        fresh = adversarial and keys.critic.input == "fresh"
        if fresh and keys.critic.order == "before":
            raise StackFault(f"objectives.{name}.critic: input 'fresh' goes with order 'after'")
        if fresh and self.accumulate > 1 and self.model.objectives[name].coupled:
            raise StackFault(
                f"objectives.{name}.critic: it couples the rows of a batch, and input 'fresh' is taken by "
                f"micro-batches; use train.accumulate=1, or input 'reuse'"
            )

    # ---- parameters

    def owners(self) -> dict[str, dict[str, nn.Parameter]]:
        """Owner -> its trainable parameters; a parameter belongs to the first owner that has it."""
        seen: set[int] = set()
        found: dict[str, dict[str, nn.Parameter]] = {}
        for owner, module in self.model.modules().items():
            critic = critic_parameters(module)
            own = {}
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen and id(parameter) not in critic and parameter.requires_grad:
                    own[name] = parameter
                    seen.add(id(parameter))
            found[owner] = own
        return found

    def _optim(self, owner: str) -> Optim:
        """``train.optim``, where keys written at the component win."""
        stack = self.model.stack
        node: Any = stack.config.get(owner)
        if owner in self.model.objectives:
            node = stack.section("objectives")[owner]
        elif owner.startswith("modules/"):
            node = stack.section("modules")[owner.removeprefix("modules/")]
        written = node.get("optim") if isinstance(node, Mapping) else None
        return Optim.model_validate({**stack.train.optim.model_dump(), **(written or {})})

    # ---- rows

    def readers(self, names: tuple[str, ...], watchers: frozenset[str] = frozenset()) -> list[Reader]:
        """Active objectives as the planner sees them; of watchers only the critic is active."""
        return [
            self.reader(name, self.model.objectives[name].needs, names, name not in watchers)
            for name in names
        ]

    def reader(
        self, name: str, needs: Mapping[str, Need], names: tuple[str, ...], learns: bool = True
    ) -> Reader:
        """One objective with given needs."""
        keys = self.model.settings[name]
        against = (
            keys.balance.against
            if keys.balance is not None and learns and keys.balance.against in names
            else None
        )
        return Reader(name, needs, self.rows[name], keys.repeat, against, learns)

    def rows_by_view(self) -> dict[str, int]:
        """Rows of this process's whole batch to make, by view and raw field, over all objectives."""
        rows: dict[str, int] = {}
        for name, objective in self.model.objectives.items():
            alone = plan(
                [self.reader(name, objective.needs, (name,))], fields=self.fields, provided=self.provided
            )
            for node in alone.demands:
                if node.reads is None:
                    rows[node.view] = max(rows.get(node.view, 0), self.rows[name] * self.accumulate)
                if node.kind == "generate" and self.model.condition:
                    field = self.model.condition
                    rows[field] = max(rows.get(field, 0), self.rows[name] * self.accumulate)
        return rows

    def micro(self, inputs: Inputs, index: int) -> Inputs:
        """One micro-batch: every A-th row, so that its first rows are first rows of the batch."""
        if self.accumulate == 1:
            return inputs
        step = slice(index, None, self.accumulate)
        views = {name: view[step] for name, view in inputs.views.items()}
        return Inputs(views, {name: values[step] for name, values in inputs.fields.items()})

    def masks(self, inputs: Inputs, clock: StepClock, step_plan: Plan | None = None) -> dict[str, Tensor]:
        """Masks of this micro-batch by sampler, (K, R, N) bool on the CPU: all, or those of a plan."""
        found = {}
        for name, sampler in self.samplers.items():
            view = inputs.views.get(sampler.view)
            if view is None or (step_plan is not None and name not in step_plan.masks):
                continue
            grid = tuple(s // p for s, p in zip(view.shape[3:], self.model.spec.patch, strict=True))
            shape = (view.shape[1], view.shape[0], math.prod(grid))
            mask = sampler(view.shape[1], view.shape[0], grid, clock.of(f"mask/{name}"))
            if mask.shape != shape or mask.dtype != torch.bool:
                raise PluginFault(
                    f"mask {name!r} is {mask.dtype} {tuple(mask.shape)}; bool (K, R, N) = {shape} is wanted"
                )
            found[name] = mask
        return found


def checked_terms(name: str, terms: Any, method: str = "forward") -> dict[str, Tensor]:
    """What an objective returned, if it keeps the contract."""
    if not isinstance(terms, dict) or not terms:
        found = "an empty dict" if isinstance(terms, dict) else type(terms).__name__
        raise PluginFault(f"objectives.{name}: {method}() returns a dict of scalars by term, not {found}")
    for term, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PluginFault(f"objectives.{name}: term {term!r} is {shape}, a scalar tensor is wanted")
        if value.dtype in {torch.bfloat16, torch.float16}:
            raise PluginFault(
                f"objectives.{name}: term {term!r} is {value.dtype}; compute it in float32 at least"
            )
    return terms
