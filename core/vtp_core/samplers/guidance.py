"""Guidance of a generator by its null condition (arXiv 2207.12598) or by a weaker one (arXiv 2406.02507)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

_FIRST = re.compile(r"first_(\d+)")
_CLOSE = 1e-6  # a level this near an edge is on it: grids are made in other orders than edges are written


def _first(value: Any) -> Any:
    named = _FIRST.fullmatch(value) if isinstance(value, str) else None
    return int(named[1]) if named else value


class Guidance(BaseModel):
    """``sampler.guidance``: by how much, at which noise levels, on which channels.

    A guided prediction is ``weak + scale * (strong - weak)``: for ``cfg`` the weak one has the null
    condition, for ``auto`` it is another generator's. Where the weight does not apply the strong one,
    conditioned, stands alone.

    Attributes:
        scale: 1 is no guidance.
        interval: noise levels u in [0, 1] that are guided, as the generator is fed them, after any shift.
        edges: ``closed`` guides at both ends of the interval, ``open`` at neither. LightningDiT's t >= 0.125
            is [0, 0.875], REPA's and RAE's own closed ones stay as they are, DDT's 0.3 < t < 1 is [0, 0.7]
            with open edges. A level within 1e-6 of an edge is on it.
        channels: ``all``, or the first k (``first_3`` and 3 are the same); the others stay conditioned. DiT,
            SiT and LightningDiT guide the first 3, whatever the latent has.
        use: ``cfg`` or ``auto``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scale: float = Field(1.0, ge=0)
    interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    edges: Literal["closed", "open"] = "closed"
    channels: Annotated[Literal["all"] | Annotated[int, Field(gt=0)], BeforeValidator(_first)] = "all"
    use: Literal["cfg", "auto"] = "cfg"

    @model_validator(mode="after")
    def _rises(self) -> Guidance:
        if self.interval[0] > self.interval[1]:
            raise ValueError(
                f"interval {list(self.interval)} falls; write [low, high] in noise levels, 0 is clean"
            )
        return self

    @property
    def everywhere(self) -> bool:
        """Whether no level is left out."""
        return self.interval == (0.0, 1.0) and self.edges == "closed"

    def applies(self, u: float) -> bool:
        """Whether the level is guided."""
        margin = _CLOSE if self.edges == "closed" else -_CLOSE
        return self.interval[0] - margin <= u <= self.interval[1] + margin

    def ahead(self, u: float) -> bool:
        """Whether a falling level has yet to meet the interval."""
        return u > self.interval[0]

    def mixed(self, strong: Tensor, weak: Tensor) -> Tensor:
        """The guided prediction of two, (R, C, *grid)."""
        if self.channels == "all":
            return weak + self.scale * (strong - weak)
        guided = strong.clone()
        first = slice(self.channels)
        guided[:, first] = weak[:, first] + self.scale * (strong[:, first] - weak[:, first])
        return guided
