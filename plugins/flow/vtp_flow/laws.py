"""Laws of the noise level in training: uniform or logit-normal, cut, shifted, scheduled over the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtp_plugins.spec import Spec

FROM_LATENT = "from_latent"


@dataclass(frozen=True)
class Law:
    """A distribution of the noise level u, and until when it holds.

    Args:
        law: ``uniform``, or ``logit_normal``: the logistic function of a normal (arXiv 2403.03206, eq. 19).
        mu: mean of that normal; a larger one means more noise.
        sigma: its standard deviation.
        until: share of the run, in (0, 1], at which the next law takes over; None holds to the end.
    """

    law: Literal["uniform", "logit_normal"] = "uniform"
    mu: float = 0.0
    sigma: float = 1.0
    until: float | None = None
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.law not in {"uniform", "logit_normal"}:
            raise ValueError(f"law: {self.law!r} is neither uniform nor logit_normal")
        if not self.sigma > 0:
            raise ValueError(f"sigma: {self.sigma} is no standard deviation; take one above 0")
        if self.until is not None and not 0 < self.until <= 1:
            raise ValueError(f"until: {self.until} is no share of the run; take one in (0, 1]")

    def level(self, draws: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws in [0, 1] to levels of this law, conditioned on lying in [low, high]; float64."""
        draws = draws.double()
        if self.law == "uniform":
            return low + (high - low) * draws
        first, last = self._share(low), self._share(high)
        normal = torch.special.ndtri(first + (last - first) * draws)
        return torch.sigmoid(self.mu + self.sigma * normal).clamp(low, high)

    def _share(self, level: float) -> float:
        """Probability of a level below ``level``."""
        if not 0 < level < 1:
            return float(level >= 1)
        normal = (math.log(level / (1 - level)) - self.mu) / self.sigma
        return 0.5 * math.erfc(-normal / math.sqrt(2))


@dataclass(frozen=True)
class Levels:
    """How a path draws noise levels: the law of the moment, within a range, then shifted.

    Args:
        laws: in order; all but the last say ``until`` when they hold.
        within: smallest and largest level before the shift.
        shift: a of u' = a u / (1 + (a - 1) u); above 1 means more noise (arXiv 2403.03206, eq. 23).
    """

    laws: tuple[Law, ...]
    within: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0

    def __post_init__(self) -> None:
        ends = [law.until for law in self.laws[:-1]]
        if not self.laws or None in ends or ends != sorted(set(ends), key=lambda end: end or 0.0):
            raise ValueError("laws: each law but the last needs 'until', a share of the run that rises")
        if not 0 <= self.within[0] < self.within[1] <= 1:
            raise ValueError(f"within: {self.within} is no range in [0, 1]; write [low, high]")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: {self.shift} is no factor; take a number above 0, or {FROM_LATENT}")

    def at(self, draws: Tensor, share: float) -> Tensor:
        """Levels (R,), float32, of uniform draws (R,) at a share of the run."""
        later = [law for law in self.laws if law.until is None or share < law.until]
        law = later[0] if later else self.laws[-1]
        return shifted(law.level(draws, *self.within), self.shift).float()


def shifted(u: Tensor, shift: float) -> Tensor:
    """Levels moved towards noise by a factor of their odds: u' = a u / (1 + (a - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def levels(
    spec: Spec,
    law: Law,
    laws: Sequence[Law],
    within: tuple[float, float],
    shift: float | str,
    base: int,
) -> Levels:
    """What a path's options mean.

    Args:
        spec: gives the latent's size where the shift is ``from_latent``.
        law: where ``laws`` is empty.
        laws: a schedule.
        within: of the law.
        shift: a factor, or ``from_latent``: sqrt(C h w / base) (RAE, arXiv 2510.11690).
        base: entries of a latent whose shift is 1.
    """
    if isinstance(shift, str):
        if shift != FROM_LATENT:
            raise ValueError(f"shift: {shift!r} is neither a number nor {FROM_LATENT}")
        if base < 1 or not spec.channels:
            raise ValueError("shift: from_latent needs a bottleneck's channels and a shift_base above 0")
        shift = math.sqrt(spec.channels * spec.tokens / base)
    return Levels(tuple(laws) or (law,), within, shift)
