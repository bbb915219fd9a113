"""Static facts of a model for the engine: who owns which parameters, who reads how many rows, which masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.critics import critic_parameters
from vtp_core.errors import PluginFault, StackFault, suggestion
from vtp_core.forwards import Inputs
from vtp_core.options import Optim
from vtp_core.planner import Reader
from vtp_plugins.needs import Need


class Layout:
    """What follows from a model, a batch size and the number of processes.

    Args:
        model: built.
        batch_size: global.
        world: processes.
        accumulate: micro-batches per step.
        provided: outputs that the dataset supplies.

    Raises:
        StackFault: a sub-batch that does not divide, a view or mask nobody defines, a coupled objective
            with accumulation.
    """

    def __init__(
        self, model: Model, batch_size: int, world: int = 1, accumulate: int = 1, provided: frozenset[str] = frozenset()
    ) -> None:
        self.model, self.batch_size, self.world, self.accumulate = model, batch_size, world, accumulate
        self.provided = provided
        self.rows = {name: self._rows(name) for name in model.objectives}
        self.samplers = self._samplers()
        needs = [need for objective in model.objectives.values() for need in objective.needs.values()]
        self.fields = frozenset(need.view for need in needs if need.view not in model.views) | self._condition()
        self.crop_free = frozenset(name for name, view in model.views.items() if view.crops is None)
        self._check(needs)
        self.optim = {owner: self._optim(owner) for owner in model.modules()}

    def _condition(self) -> frozenset[str]:
        return frozenset({self.model.condition} if self.model.condition else ()) | self.provided

    def _rows(self, name: str) -> int:
        """Rows of one micro-batch of one process that an objective reads."""
        share, parts = self.model.settings[name].rows, self.world * self.accumulate
        rows = share * self.batch_size
        if abs(rows - round(rows)) > 1e-6 or round(rows) % parts:
            low = max(parts, int(rows) // parts * parts)
            near = sorted({round(low / share), round((low + parts) / share)})
            raise StackFault(
                f"objectives.{name}.rows: {share} x batch_size {self.batch_size} = {rows:g} rows do not divide by "
                f"{self.world} processes x {self.accumulate} micro-batches; use data.batch_size={near[0]} or {near[-1]}"
            )
        return round(rows) // parts

    def _samplers(self) -> dict[str, Any]:
        """Mask samplers by name; equal definitions merge."""
        found: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for name, objective in self.model.objectives.items():
            for mask, sampler in objective.masks.items():
                if mask in found and found[mask] != sampler:
                    raise StackFault(
                        f"mask {mask!r} is defined differently by objectives.{owners[mask]} and objectives.{name}"
                    )
                found[mask] = sampler
                owners.setdefault(mask, name)
        return found

    def _check(self, needs: list[Need]) -> None:
        for name, objective in self.model.objectives.items():
            if objective.coupled and self.accumulate > 1:
                raise StackFault(
                    f"objectives.{name} couples the rows of a batch, so train.accumulate={self.accumulate} would change "
                    "its loss; use train.accumulate=1 and more processes"
                )
            keys = self.model.settings[name]
            if keys.balance is not None and keys.balance.against not in self.model.objectives:
                against = keys.balance.against
                raise StackFault(
                    f"objectives.{name}.balance.against: no {against!r}{suggestion(against, self.model.objectives)}"
                )
        for need in needs:
            masks = {o.partition("@")[2] for o in need.want if "@" in o}
            masks |= {need.mask} if need.mask not in {None, "any"} else set()
            for mask in masks:
                if mask not in self.samplers:
                    raise StackFault(f"no mask sampler {mask!r}{suggestion(str(mask), self.samplers)}")
            if need.source.startswith("teacher:") and need.source[8:] not in self.model.teachers:
                raise StackFault(f"no {need.source[8:]!r} under teachers{suggestion(need.source[8:], self.model.teachers)}")

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
        if owner in self.model.objectives:
            node = stack.section("objectives")[owner]
        elif owner.startswith("modules/"):
            node = stack.section("modules")[owner[8:]]
        else:
            node = stack.config.get(owner)  # type: ignore[assignment]
        written = node.get("optim") if isinstance(node, Mapping) else None
        return Optim.model_validate({**stack.train.optim.model_dump(), **(written or {})})

    # ---- rows

    def readers(self, names: tuple[str, ...]) -> list[Reader]:
        """Active objectives as the planner sees them."""
        return [self.reader(name, self.model.objectives[name].needs, names) for name in names]

    def reader(self, name: str, needs: Mapping[str, Need], names: tuple[str, ...]) -> Reader:
        """One objective with given needs."""
        keys = self.model.settings[name]
        against = keys.balance.against if keys.balance is not None and keys.balance.against in names else None
        return Reader(name, needs, self.rows[name], keys.repeat, against)

    def rows_by_view(self) -> dict[str, int]:
        """Rows of this process's whole batch to make, by view and raw field, over all objectives."""
        rows: dict[str, int] = {}
        for name, objective in self.model.objectives.items():
            for need in objective.needs.values():
                rows[need.view] = max(rows.get(need.view, 0), self.rows[name] * self.accumulate)
        for field in self._condition():
            rows[field] = max(rows.values(), default=0)
        return rows

    def micro(self, inputs: Inputs, index: int) -> Inputs:
        """One micro-batch: every A-th row, so that its first rows are first rows of the batch."""
        if self.accumulate == 1:
            return inputs
        step = slice(index, None, self.accumulate)
        views = {name: view[step] for name, view in inputs.views.items()}
        return Inputs(views, {name: values[step] for name, values in inputs.fields.items()})

    def masks(self, inputs: Inputs, clock: StepClock) -> dict[str, Tensor]:
        """Masks of this micro-batch, (K, R, N) bool on the CPU, by sampler."""
        found = {}
        for name, sampler in self.samplers.items():
            view = inputs.views.get(sampler.view)
            if view is not None:
                grid = tuple(s // p for s, p in zip(view.shape[3:], self.model.spec.patch, strict=True))
                found[name] = sampler(view.shape[1], view.shape[0], grid, clock.of(f"mask/{name}"))
        return found


def checked_terms(name: str, terms: Any) -> dict[str, Tensor]:
    """What an objective returned, if it keeps the contract."""
    if not isinstance(terms, dict) or not terms:
        raise PluginFault(f"objectives.{name}: forward() returns a dict of scalars by term, not {type(terms).__name__}")
    for term, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise PluginFault(f"objectives.{name}: term {term!r} is {shape}, a scalar tensor is wanted")
    return terms
