"""Links between features and latents, and the chain that applies them (arXiv 2512.13687, 2510.11690)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec


def width_in(spec: Spec) -> int:
    """Channels that a link reads: the previous link's, or the encoder's width for the first."""
    return spec.channels or spec.width


class Linear(nn.Linear):
    """One matrix over channels; VTP's bottleneck.

    Args:
        spec: tells the channels it reads.
        channels: C of what it gives.
        bias: add a bias.
    """

    def __init__(self, spec: Spec, *, channels: Annotated[int, Field(gt=0)], bias: bool = False) -> None:
        super().__init__(width_in(spec), channels, bias=bias)
        self.channels = channels
        nn.init.trunc_normal_(self.weight, std=0.02)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        return {"latent": super().forward(x)}


class RMSNorm(nn.Module):
    """Every token to root mean square 1, without weights: latents on a sphere of radius sqrt(C).

    Args:
        spec: tells the channels.
        eps: added to the mean square.
    """

    normalises: ClassVar[bool] = True

    def __init__(self, spec: Spec, *, eps: Annotated[float, Field(gt=0)] = 1e-6) -> None:
        super().__init__()
        self.channels = width_in(spec)
        self.eps = eps

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return {"latent": y.to(x.dtype)}


class Noise(nn.Module):
    """Gaussian noise for the decoder alone, at one level per row; the latent stays clean.

    Args:
        spec: tells the channels.
        law: of the level: ``uniform`` in [0, tau) as in RAE's code, ``half_normal`` |N(0, tau^2)| as in its
            paper, or ``fixed`` at tau.
        tau: scale of the level.
    """

    carries: ClassVar[str] = "latent.noisy"

    def __init__(
        self,
        spec: Spec,
        *,
        law: Literal["uniform", "half_normal", "fixed"] = "uniform",
        tau: Annotated[float, Field(ge=0)] = 0.8,
    ) -> None:
        super().__init__()
        self.channels = width_in(spec)
        self.law = law
        self.tau = tau

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        if clock is None or not self.training:
            return {"latent": x, "latent.noisy": x}
        level = self._level(len(x), clock).to(x).view(-1, *[1] * (x.ndim - 1))  # (R,) -> (R, 1, ..., 1)
        return {"latent": x, "latent.noisy": x + level * clock.normal("noise.value", *x.shape).to(x)}

    def _level(self, rows: int, clock: Clock) -> Tensor:
        """Levels of the noise, (R,)."""
        if self.law == "uniform":
            return self.tau * clock.uniform("noise.level", rows)
        if self.law == "half_normal":
            return self.tau * clock.normal("noise.level", rows).abs()
        return torch.full((rows,), self.tau)


class Chain(nn.Module):
    """Links applied in order.

    Where a link carries something else than its latent (noise, a sample, a quantised value), both go on:
    later links apply to the clean latent without randomness and to the carried value with it. So the clean
    and every carried ``latent...`` come out with the channels and the norm of the chain's end.

    Args:
        links: as :class:`vtp_plugins.protocols.Bottleneck` describes them.
        channels: C of a chain without links, which gives what it reads.
    """

    def __init__(self, links: Sequence[nn.Module], channels: int = 0) -> None:
        super().__init__()
        self.links = nn.ModuleList(links)
        self.channels: int = getattr(links[-1], "channels", channels) if links else channels

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the last matrix or kernel of the chain; none without one."""
        weights = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        return {"last": weights[-1]} if weights else {}

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        """Tokens (..., N, D) to ``latent``, what links add, and ``carried``, which the decoder reads."""
        streams = {"latent": x}
        carried = "latent"
        extras: dict[str, Tensor] = {}
        for link in self.links:
            made: dict[str, Tensor] = link(streams[carried], clock)
            others = {name: link(value)["latent"] for name, value in streams.items() if name != carried}
            streams = others | {carried: made["latent"]}
            extras |= {name: value for name, value in made.items() if name != "latent"}
            carries: Any = getattr(link, "carries", "latent")
            if carries != "latent" and carries in made:
                carried = carries
                streams[carried] = extras.pop(carried)
        return extras | streams | {"carried": streams[carried]}
