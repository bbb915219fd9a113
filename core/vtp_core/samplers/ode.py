"""Samplers that integrate dx/du = v from noise to data: Euler, Heun, and Dormand and Prince's pair."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from vtp_core.samplers.field import Field
from vtp_core.samplers.levels import Level, Levels, Shift, Steps, check_velocity
from vtp_plugins.clock import Clock
from vtp_plugins.errors import StackFault
from vtp_plugins.spec import Spec


class Euler:
    """x(u') = x(u) + (u' - u) v(x, u): one evaluation a step.

    References count grid points: SiT's, LightningDiT's and RAE's ``num_steps`` N are N - 1 steps here (RAE
    with ``end: 0.001``), REPA's and DDT's are N (DDT with ``last_step: 0.04``).

    Args:
        spec: its path is checked.
        steps: evaluations.
        shift: a of u' = a u / (1 + (a - 1) u), or ``from_latent``: sqrt(C h w / 4096). LightningDiT's s is 1 / a.
        start: first noise level, before the shift.
        end: last noise level, before the shift.
        last_step: length of the last step before the shift; None makes all equal.

    Raises:
        ValueError: a value out of its range, or a path without velocities.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        steps: Steps = 50,
        shift: Shift = 1.0,
        start: Level = 1.0,
        end: Level = 0.0,
        last_step: Level | None = None,
    ) -> None:
        self.levels = Levels(steps, shift, start, end, last_step)
        check_velocity(spec.path, self)

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        check_velocity(field.path, self)
        x = clock.normal("noise", *shape)
        levels, lengths = self.levels.on(x)
        field.start(len(lengths))
        for index, h in enumerate(lengths):
            x = x + h * field.velocity(x, levels[index : index + 1], condition)
        return x


class Heun:
    """A trapezium a step, its far end guessed by Euler: two evaluations a step.

    Guidance and reuse are decided where a step begins, so that both of its slopes belong to one field.
    torchdiffeq's ``heun2`` of N points is N - 1 steps; REPA's N steps are N here with ``last: euler``.

    Args:
        spec: its path is checked.
        steps: of two evaluations.
        shift: as of Euler.
        start: first noise level, before the shift.
        end: last noise level, before the shift.
        last_step: length of the last step before the shift; None makes all equal.
        last: ``euler`` leaves the correction out of the last step (EDM, arXiv 2206.00364, algorithm 1): one
            evaluation less, and none at ``end``.

    Raises:
        ValueError: a value out of its range, or a path without velocities.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        steps: Steps = 25,
        shift: Shift = 1.0,
        start: Level = 1.0,
        end: Level = 0.0,
        last_step: Level | None = None,
        last: Literal["heun", "euler"] = "heun",
    ) -> None:
        self.levels = Levels(steps, shift, start, end, last_step)
        self.corrected = steps - (last == "euler")
        check_velocity(spec.path, self)

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        check_velocity(field.path, self)
        x = clock.normal("noise", *shape)
        levels, lengths = self.levels.on(x)
        field.start(len(lengths))
        for index, h in enumerate(lengths):
            u, after = levels[index : index + 1], levels[index + 1 : index + 2]
            slope = field.velocity(x, u, condition)
            if index < self.corrected:
                slope = (slope + field.velocity(x + h * slope, after, condition, at=u)) / 2
            x = x + h * slope
        return x


class Dopri5:
    """Dormand and Prince's pair of orders 5 and 4, steps by torchdiffeq's control of the error.

    The error is one norm over the whole batch: a sample depends, within the tolerances, on its neighbours.
    The last step reaches past ``end`` and is interpolated, so the generator may see levels beyond it.

    Args:
        spec: its path is checked.
        rtol: relative tolerance.
        atol: absolute tolerance.
        start: first noise level.
        end: last noise level.

    Raises:
        ValueError: torchdiffeq is not installed, a value is out of its range, or the path has no velocities.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        rtol: Annotated[float, pydantic.Field(gt=0)] = 1e-3,
        atol: Annotated[float, pydantic.Field(gt=0)] = 1e-6,
        start: Level = 1.0,
        end: Level = 0.0,
    ) -> None:
        self.levels, self.rtol, self.atol = Levels(1, 1.0, start, end), rtol, atol
        check_velocity(spec.path, self)
        try:
            self._integrate = importlib.import_module("torchdiffeq").odeint
        except ImportError as error:
            raise StackFault(
                "sampler.use: dopri5 needs torchdiffeq, which is not installed\nbring it: pip install torchdiffeq"
            ) from error

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        check_velocity(field.path, self)
        x = clock.normal("noise", *shape)
        field.start(0)
        ends = self.levels.of(shape).to(x)

        def slope(u: Tensor, x: Tensor) -> Tensor:
            return field.velocity(x, u.view(1), condition)

        states: Tensor = self._integrate(slope, x, ends, rtol=self.rtol, atol=self.atol, method="dopri5")
        return states[-1]  # (2, R, C, *grid) -> (R, C, *grid)
