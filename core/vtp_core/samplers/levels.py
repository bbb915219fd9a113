"""Where samplers evaluate: noise levels from ``start`` down to ``end``, shifted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from vtp_plugins.errors import StackFault
from vtp_plugins.protocols import NoisePath

Steps = Annotated[int, pydantic.Field(gt=0)]
Level = Annotated[float, pydantic.Field(ge=0, le=1)]
Shift = Annotated[float, pydantic.Field(gt=0)] | Literal["from_latent"]

BASE = 4096  # entries of a latent whose shift is 1 (arXiv 2510.11690, section 4)


@dataclass(frozen=True)
class Levels:
    """Noise levels of an integration; u is 1 for noise and 0 where clean.

    Args:
        steps: intervals between levels.
        shift: a of u' = a u / (1 + (a - 1) u), which moves every level, the ends too; above 1 spends more
            steps on noise. ``from_latent`` is sqrt(C h w / 4096).
        start: first level, before the shift.
        end: last level, before the shift.
        last_step: length of the last interval before the shift, the others being equal; None makes all equal.

    Raises:
        ValueError: a value out of its range; the message begins with its option.
    """

    steps: int
    shift: float | str = 1.0
    start: float = 1.0
    end: float = 0.0
    last_step: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: {self.steps} makes no sampler; take 1 or more")
        if not (
            self.shift == "from_latent" or (not isinstance(self.shift, str) and 0 < self.shift < math.inf)
        ):
            raise ValueError(f"shift: {self.shift!r} is no factor; take a number above 0, or from_latent")
        if not 0 <= self.end < self.start <= 1:
            raise ValueError(
                f"start: levels fall from {self.start} to end {self.end}; keep 0 <= end < start <= 1"
            )
        if self.last_step is not None and not 0 < self.last_step <= self.start - self.end:
            raise ValueError(f"last_step: {self.last_step} is no length between {self.start} and {self.end}")

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """The levels for latents of ``shape`` = (R, C, *grid): (steps + 1,), falling, float64 on the CPU."""
        if self.last_step is None:
            u = torch.linspace(self.start, self.end, self.steps + 1, dtype=torch.float64)
        else:
            before = torch.linspace(self.start, self.end + self.last_step, self.steps, dtype=torch.float64)
            u = torch.cat([before, torch.tensor([self.end], dtype=torch.float64)])
        a = math.sqrt(math.prod(shape[1:]) / BASE) if isinstance(self.shift, str) else self.shift
        return a * u / (1 + (a - 1) * u)

    def on(self, x: Tensor) -> tuple[Tensor, list[float]]:
        """The levels for latents x on their device, and the changes from each to the next, below 0.

        Levels are float64 where the device has it: near 1, what is left of the data is their difference from it.
        """
        u = self.of(tuple(x.shape))
        return u.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64), u.diff().tolist()


def check_velocity(path: NoisePath | None, sampler: object) -> None:
    """Refuse a path without velocities; None is not known yet, and passes.

    Raises:
        StackFault: the path has none.
    """
    if path is None:
        return
    nothing = torch.zeros(1, 1)
    try:
        path.convert(nothing, nothing, torch.full((1,), 0.5), "velocity")
    except ValueError as error:
        raise StackFault(f"sampler.use: {type(sampler).__name__} follows velocities; {error}") from error
