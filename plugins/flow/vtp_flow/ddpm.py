"""DDPM's discrete process as a path of noise levels: u = (t + 1) / T (arXiv 2006.11239, 2102.09672)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vtp_flow.chain import Chain, spaced, strided
from vtp_flow.convert import Meaning, along, converted
from vtp_flow.laws import Law, levels
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec


class DDPM:
    """alpha^2 = alpha-bar, at T levels; a level between two is taken for the nearer one, and 0 is clean.

    It has no velocities: sample it by ``ddpm`` or ``ddim``, which read :attr:`chain` and :meth:`respaced`.

    Args:
        spec: shapes; read for ``shift: from_latent`` only.
        predicts: what the generator predicts.
        timesteps: T.
        schedule: betas linear from ``betas[0]`` to ``betas[1]``, or by a squared cosine of alpha-bar.
        betas: first and last, as for 1000 timesteps; scaled by 1000 / T.
        law: of u; ``logit_normal`` takes ``mu`` and ``sigma``.
        mu: larger means more noise.
        sigma: of the normal.
        laws: a schedule over the run, in place of ``law``.
        shift: of drawn levels, a factor or ``from_latent``.
        shift_base: entries of a latent whose shift is 1.

    Attributes:
        chain: all T steps.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        predicts: Literal["noise", "data", "score"] = "noise",
        timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "linear",
        betas: tuple[float, float] = (1e-4, 0.02),
        law: Literal["uniform", "logit_normal"] = "uniform",
        mu: float = 0.0,
        sigma: float = 1.0,
        laws: Sequence[Law] = (),
        shift: float | str = 1.0,
        shift_base: int = 4096,
    ) -> None:
        if predicts not in {"noise", "data", "score"}:
            raise ValueError(f"predicts: ddpm predicts noise, data or score, not {predicts!r}")
        if timesteps < 2:
            raise ValueError(f"timesteps: {timesteps} makes no process; take 2 or more")
        self.predicts: Meaning = predicts
        self.levels = levels(spec, Law(law, mu, sigma), laws, (0.0, 1.0), shift, shift_base)
        steps = _cosine(timesteps) if schedule == "cosine" else _linear(timesteps, betas)
        self._cumulative = torch.cumprod(1 - steps, 0)
        self.chain = Chain(self._cumulative, torch.arange(timesteps))
        kept = torch.cat([torch.ones(1, dtype=torch.float64), self._cumulative])
        values = torch.stack([kept.sqrt(), (1 - kept).sqrt()])
        slopes = values.diff() * timesteps
        self._table = torch.cat([values, torch.cat([slopes[:, :1], slopes], 1)])  # (4, T + 1)

    def respaced(self, steps: int | Sequence[int], spacing: Literal["even", "stride"] = "even") -> Chain:
        """The process of a subset of the timesteps, for a sampler of fewer steps.

        Args:
            steps: how many, or how many in each of several equal sections of the process.
            spacing: ``even`` spreads them and keeps both ends (DDPM); ``stride`` takes every so many from
                t = 0 (DDIM).
        """
        timesteps = len(self.chain)
        if spacing == "stride" and isinstance(steps, int):
            return Chain(self._cumulative, strided(timesteps, steps))
        sections = [steps] if isinstance(steps, int) else steps
        return Chain(self._cumulative, spaced(timesteps, sections))

    def index(self, u: Tensor) -> Tensor:
        """Timesteps t = u T - 1 of levels, int64, -1 where clean."""
        return (u.double() * len(self.chain)).round().long() - 1

    def draw(self, name: str, rows: int, clock: Clock) -> Tensor:
        """Levels (R,) of this step, each of them one of the T."""
        continuous = self.levels.at(clock.uniform(name, rows), clock.share)
        steps = len(self.chain)
        return ((continuous.double() * steps).floor().clamp(max=steps - 1) + 1).div(steps).float()

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, and their differences to the next cleaner level as derivatives, each shaped as u."""
        place = self.index(u) + 1
        dtype = u.dtype if u.dtype == torch.float64 else torch.float32
        alpha, sigma, d_alpha, d_sigma = self._table.to(u.device)[:, place].to(dtype)
        return alpha, sigma, d_alpha, d_sigma

    def mix(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """alpha x + sigma noise."""
        alpha, sigma, _, _ = along(self.coefficients(u), x)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """The noise, the data, or the score -noise / sigma."""
        if self.predicts == "score":
            return -noise / along(self.coefficients(u), x)[1]
        return noise if self.predicts == "noise" else x

    def convert(self, value: Tensor, x: Tensor, u: Tensor, to: str, given: str | None = None) -> Tensor:
        """A prediction at x = x_u among noise, data and score.

        Raises:
            ValueError: a velocity is given or wanted.
        """
        given = given or self.predicts
        if "velocity" in {given, to}:
            raise ValueError("path: ddpm has no velocities; sample it with ddpm or ddim, or take vp")
        return converted(value, x, along(self.coefficients(u), x), given, to)


def _linear(timesteps: int, ends: tuple[float, float]) -> Tensor:
    scale = 1000 / timesteps
    if not 0 < ends[0] <= ends[1] or not scale * ends[1] < 1:
        raise ValueError(f"betas: {ends} with timesteps: {timesteps} leave (0, 1); lower them")
    return torch.linspace(scale * ends[0], scale * ends[1], timesteps, dtype=torch.float64)


def _cosine(timesteps: int) -> Tensor:
    """Betas of arXiv 2102.09672, eq. 17, at most 0.999."""
    places = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    kept = ((places + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
