"""Samplers that follow the reverse stochastic equation of a path (SiT, arXiv 2401.08740, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from vtp_core.samplers.field import Field
from vtp_core.samplers.levels import Level, Levels, Shift, Steps, check_velocity
from vtp_plugins.clock import Clock
from vtp_plugins.errors import StackFault
from vtp_plugins.protocols import NoisePath
from vtp_plugins.spec import Spec


def _sbdm(path: NoisePath, u: Tensor) -> Tensor:
    alpha, sigma, d_alpha, d_sigma = path.coefficients(u)
    return sigma * d_sigma - d_alpha / alpha * sigma**2


FORMS: Mapping[str, Callable[[NoisePath, Tensor, float], Tensor]] = {
    "constant": lambda path, u, norm: torch.full_like(u, norm),
    "sbdm": lambda path, u, norm: norm * _sbdm(path, u),
    "sigma": lambda path, u, norm: norm * path.coefficients(u)[1],
    "linear": lambda path, u, norm: norm * u,
    "decreasing": lambda path, u, norm: 0.25 * (1 - norm * (math.pi * u).cos()) ** 2,
    "inc-dec": lambda path, u, norm: norm * (math.pi * u).sin() ** 2,
}
"""Diffusion w(u) by name; ``norm`` is its size."""


class EulerMaruyama:
    """x(u - h) = x - h v + h w s + sqrt(2 w h) n, with velocity v, score s and diffusion w, all at u.

    Velocity and score come from one evaluation (SiT's reference takes two). SiT's ``num_steps`` N are N steps
    here with its last step and N - 1 with ``last: none``; REPA's N are N.

    Args:
        spec: its path is checked.
        steps: the last one included.
        diffusion: w(u): ``constant`` norm, ``sigma`` norm * sigma(u), ``linear`` norm * u, ``inc-dec``
            norm * sin(pi u)^2, ``decreasing`` (1 - norm cos(pi u))^2 / 4, and ``sbdm``, norm times what the
            path's own forward equation has, sigma sigma' - alpha' / alpha sigma^2, infinite at u = 1 on
            ``linear`` and ``gvp``.
        norm: of the diffusion. DDT's ``sde_preserve`` is sigma with 0.5.
        method: ``heun`` makes a step's noise first and then follows a trapezium: two evaluations.
        last: the step to ``end`` without noise: ``mean`` takes the drift, ``euler`` the velocity alone,
            ``tweedie`` the expected data at once; ``none`` makes it a step like the others.
        last_step: its length; ``none`` takes none.
        shift: a of u' = a u / (1 + (a - 1) u), or ``from_latent``: sqrt(C h w / 4096); it moves the last step too.
        start: first noise level, before the shift.
        end: last noise level, before the shift.

    Raises:
        ValueError: a value out of its range, or a path without velocities.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        steps: Steps = 250,
        diffusion: Literal["constant", "sbdm", "sigma", "linear", "decreasing", "inc-dec"] = "sigma",
        norm: Annotated[float, pydantic.Field(ge=0)] = 1.0,
        method: Literal["euler", "heun"] = "euler",
        last: Literal["mean", "tweedie", "euler", "none"] = "mean",
        last_step: Level = 0.04,
        shift: Shift = 1.0,
        start: Level = 1.0,
        end: Level = 0.0,
    ) -> None:
        if diffusion not in FORMS:
            raise ValueError(f"diffusion: {diffusion!r} is none of {', '.join(FORMS)}")
        self.levels = Levels(steps, shift, start, end, None if last == "none" else last_step)
        self.diffusion, self.norm, self.heun, self.last = FORMS[diffusion], norm, method == "heun", last
        if self.heun and last == "none" and end == 0:
            raise ValueError(
                "method: heun evaluates at end, and 0 has no score; take last: mean, or end: 0.001"
            )
        check_velocity(spec.path, self)

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        check_velocity(field.path, self)
        x = clock.normal("noise", *shape)
        levels, lengths = self.levels.on(x)
        weights = self._weights(field.path, levels)
        field.start(len(lengths))
        noisy = len(lengths) - (self.last != "none")
        for index, change in enumerate(lengths[:noisy]):
            h = -change
            noise = clock.normal(f"step{index}", *shape) * math.sqrt(2 * weights[index] * h)
            u = levels[index : index + 2]
            x = self._step(field, x, u, h, weights[index : index + 2], noise, condition)
        if noisy < len(lengths):
            x = self._final(field, x, levels[noisy:], -lengths[noisy], weights[noisy], condition)
        return x

    def _step(
        self, field: Field, x: Tensor, u: Tensor, h: float, w: list[float], noise: Tensor, condition: Any
    ) -> Tensor:
        """One step; u and w are those of its two ends."""
        if not self.heun:
            return x + h * drift(field, x, u[:1], w[0], condition) + noise
        x = x + noise
        slope = drift(field, x, u[:1], w[0], condition)
        return x + h / 2 * (slope + drift(field, x + h * slope, u[1:], w[1], condition, at=u[:1]))

    def _final(self, field: Field, x: Tensor, u: Tensor, h: float, w: float, condition: Any) -> Tensor:
        if self.last != "tweedie":
            return x + h * drift(field, x, u[:1], w if self.last == "mean" else 0.0, condition)
        found = field.predict(x, u[:1], condition)["prediction"]
        return field.path.convert(found, x, u[:1], "data").to(x.dtype)

    def _weights(self, path: NoisePath, levels: Tensor) -> list[float]:
        """w at every level but a last one that nothing is evaluated at."""
        weights = self.diffusion(path, levels, self.norm).tolist()
        if not all(math.isfinite(w) for w in weights[:-1]):
            raise StackFault(
                "sampler.diffusion: sbdm is infinite at level 1 of this path; begin below it, as with start: 0.999"
            )
        return [float(w) for w in weights]


def drift(field: Field, x: Tensor, u: Tensor, w: float, condition: Any, at: Tensor | None = None) -> Tensor:
    """-v + w s, the change of x as u falls, from one evaluation."""
    found = field.predict(x, u, condition, at)["prediction"]
    change = -field.path.convert(found, x, u, "velocity")
    if w:
        change = change + w * field.path.convert(found, x, u, "score")
    return change.to(x.dtype)
