"""Continuous paths from data to noise: straight, trigonometric, variance preserving (SiT, arXiv 2401.08740)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vtp_core.nn.chunked import wide
from vtp_flow.convert import Coefficients, Meaning, along, converted
from vtp_flow.laws import Law, levels
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec


class Path:
    """x_u = alpha(u) data + sigma(u) noise; u = 0 is clean and 1 is noise. A subclass gives the coefficients.

    Args:
        spec: shapes; read for ``shift: from_latent`` only.
        predicts: what the generator predicts.
        law: of u; ``logit_normal`` takes ``mu`` and ``sigma``.
        mu: larger means more noise.
        sigma: of the normal.
        laws: a schedule over the run, in place of ``law``: ``[{law: logit_normal, until: 0.6}, {}]``.
        within: smallest and largest u drawn, before the shift; by default where the target is finite.
        shift: a of u' = a u / (1 + (a - 1) u) on what is drawn, or ``from_latent``: sqrt(C h w / base).
        shift_base: entries of a latent whose shift is 1.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        predicts: Literal["velocity", "noise", "data", "score"] = "velocity",
        law: Literal["uniform", "logit_normal"] = "uniform",
        mu: float = 0.0,
        sigma: float = 1.0,
        laws: Sequence[Law] = (),
        within: tuple[float, float] | None = None,
        shift: float | str = 1.0,
        shift_base: int = 4096,
    ) -> None:
        if predicts not in {"velocity", "noise", "data", "score"}:
            raise ValueError(f"predicts: {predicts!r} is none of velocity, noise, data, score")
        self.predicts: Meaning = predicts
        within = within or self.ends(predicts)
        self.levels = levels(spec, Law(law, mu, sigma), laws, within, shift, shift_base)

    @staticmethod
    def ends(predicts: Meaning) -> tuple[float, float]:
        """Levels within which targets and conversions stay finite, as SiT trains."""
        return (0.0, 1.0) if predicts == "velocity" else (1e-3, 1 - 1e-3)

    def draw(self, name: str, rows: int, clock: Clock) -> Tensor:
        """Noise levels of a training step, (R,) float32."""
        return self.levels.at(clock.uniform(name, rows), clock.share)

    def coefficients(self, u: Tensor) -> Coefficients:
        """alpha, sigma and their derivatives by u, each shaped as u, in float32 at least."""
        raise NotImplementedError

    def mix(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """alpha x + sigma noise, (R, C, *grid)."""
        alpha, sigma, _, _ = along(self.coefficients(u), x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """What the generator predicts, (R, C, *grid); the score is -noise / sigma, infinite where clean."""
        if self.predicts == "noise":
            return noise
        if self.predicts == "data":
            return x
        _, sigma, d_alpha, d_sigma = along(self.coefficients(u), x)
        return -noise / sigma if self.predicts == "score" else d_alpha * x + d_sigma * noise

    def convert(self, value: Tensor, x: Tensor, u: Tensor, to: str, given: str | None = None) -> Tensor:
        """A prediction ``value`` at ``x`` = x_u from one meaning to another.

        Not finite where the wanted quantity isn't determined: noise at u = 0, data at u = 1, unless both
        come from a velocity.
        """
        return converted(value, x, along(self.coefficients(u), x), given or self.predicts, to)


class Linear(Path):
    """The straight path: alpha = 1 - u, sigma = u; its velocity is noise - data (arXiv 2210.02747)."""

    def coefficients(self, u: Tensor) -> Coefficients:
        u = wide(u)
        one = torch.ones_like(u)
        return 1 - u, u, -one, one


class GVP(Path):
    """The trigonometric path: alpha = cos(pi u / 2), sigma = sin(pi u / 2)."""

    def coefficients(self, u: Tensor) -> Coefficients:
        u = wide(u)
        alpha = ((1 - u) * (math.pi / 2)).sin()  # exact at u = 1, and near it; a cosine is not
        sigma = (u * (math.pi / 2)).sin()
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha


class VP(Path):
    """The variance-preserving diffusion with linear beta: log alpha = -u^2 (b1 - b0) / 4 - u b0 / 2.

    Some data is left at u = 1 (alpha = 0.0066). From arXiv 2011.13456, appendix B.
    """

    BETAS = (0.1, 20.0)

    @staticmethod
    def ends(predicts: Meaning) -> tuple[float, float]:
        """sigma has no derivative at 0."""
        return 1e-5, 1.0

    def coefficients(self, u: Tensor) -> Coefficients:
        u = wide(u)
        first, last = self.BETAS
        exponent = -(u**2) * (last - first) / 4 - u * first / 2
        alpha, sigma = exponent.exp(), (-torch.expm1(2 * exponent)).sqrt()
        d_alpha = alpha * (-u * (last - first) - first) / 2
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma
