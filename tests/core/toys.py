"""Modules of negligible size, one of every kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec


class Plane:
    """A modality of three channels over two axes, floats as they are."""

    channels, axes = 3, 2

    def __init__(self, spec: Spec) -> None: ...

    def normalise(self, x: Tensor) -> Tensor:
        return x / 127.5 - 1 if x.dtype == torch.uint8 else x

    def to_display(self, x: Tensor) -> Tensor:
        return (x + 1) / 2


class Wave(Plane):
    """One channel over time."""

    channels, axes = 1, 1


class Patches(nn.Module):
    """A linear patch embedding and `depth` layers of tanh, over any number of axes; counts its calls."""

    def __init__(
        self,
        spec: Spec,
        *,
        patch: int = 4,
        image_size: int = 8,
        width: int = 6,
        depth: int = 2,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        axes = len(spec.size)
        self.width, self.depth, self.jitter = width, depth, jitter
        self.patch, self.size = (patch,) * axes, (image_size,) * axes
        self.embed = nn.Linear(spec.signal_channels * patch**axes, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.mask_token = nn.Parameter(torch.randn(width))
        self.summary = nn.Linear(width, width)
        self.calls: list[dict[str, Any]] = []

    def forward(
        self,
        x: Tensor,
        *,
        want: Mapping[str, int] | None = None,
        mask: Tensor | None = None,
        select: Mapping[str, Tensor] | None = None,
        drop: float | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Tensor]:
        self.calls.append(
            {"want": dict(want or {}), "rows": len(x), "masked": mask is not None, "training": self.training}
        )
        tokens = self.embed(cells(x, self.patch))  # (B, N, D)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        rate = self.jitter if drop is None else drop
        if rate and self.training and clock is not None:
            tokens = tokens * (1 + rate * clock.normal("jitter", len(x), 1, 1).to(tokens))
        return self.blocks(tokens)

    def blocks(self, tokens: Tensor) -> dict[str, Tensor]:
        found = {}
        for index, layer in enumerate(self.layers):
            tokens = tokens + torch.tanh(layer(tokens))
            found[f"hidden:{index + 1}"] = tokens
        return {**found, "patches": tokens, "cls": torch.tanh(self.summary(tokens.mean(1)))}


def cells(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, ch, *size) to (B, N, ch * prod(patch))."""
    for axis, side in enumerate(patch):
        x = x.unfold(2 + axis, side, side)  # the patch's axes gather at the end
    axes = len(patch)
    x = x.movedim(1, 1 + axes)  # (B, *grid, ch, *patch)
    return x.flatten(1 + axes).flatten(1, axes)


class Unpatch(nn.Module):
    """Linear from latents to pixels, with its last matrix as an anchor."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.patch, self.channels = spec.patch, spec.signal_channels
        self.first = nn.Linear(spec.channels, 8)
        self.last = nn.Linear(8, spec.signal_channels * math.prod(spec.patch))
        self.anchors = {"last": self.last.weight}

    def forward(
        self, z: Tensor, *, want: frozenset[str] = frozenset({"decoded"}), clock: Clock | None = None
    ) -> dict[str, Tensor]:
        grid = z.shape[2:]
        hidden = torch.tanh(self.first(z.flatten(2).transpose(1, 2)))  # (B, N, 8)
        x = self.last(hidden).unflatten(2, (self.channels, *self.patch)).unflatten(1, grid)
        axes = len(grid)
        x = x.movedim(1 + axes, 1)  # (B, ch, *grid, *patch)
        for axis in range(axes):
            x = x.movedim(2 + axes + axis, 3 + 2 * axis)  # (B, ch, h, p, w, q)
        for axis in range(axes):
            x = x.flatten(2 + axis, 3 + axis)
        return {"decoded": x, "decoder.hidden:1": hidden}


class Rounded(nn.Module):
    """Quantises to multiples of `step`, straight through; the decoder reads the quantised latent."""

    carries = "latent.quantised"

    def __init__(self, spec: Spec, *, step: float = 0.5) -> None:
        super().__init__()
        self.channels, self.step = spec.channels, step

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        near = (x / self.step).round()
        quantised = x + (near * self.step - x).detach()
        return {"latent": x, "latent.quantised": quantised, "indices": near[..., 0].long()}


class Teacher(nn.Module):
    """A frozen linear model on display values."""

    def __init__(self, spec: Spec, *, width: int = 5) -> None:
        super().__init__()
        self.width, self.patch = width, spec.patch
        self.embed = nn.Linear(spec.signal_channels * math.prod(spec.patch), width)

    def forward(self, x: Tensor, *, want: frozenset[str]) -> dict[str, Tensor]:
        tokens = self.embed(cells(x, self.patch))
        return {"patches": tokens, "cls": tokens.mean(1)}


class Straight:
    """The straight path: data at u = 0, noise at u = 1."""

    def __init__(self, spec: Spec) -> None: ...

    def draw(self, name: str, rows: int, clock: Clock) -> Tensor:
        return clock.uniform(name, rows)

    def mix(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        u = u.view(-1, *[1] * (x.ndim - 1))
        return (1 - u) * x + u * noise

    def target(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return noise - x


class Denoiser(nn.Module):
    """Two layers on noisy latents; with `network`, the encoder's own blocks (UNITE)."""

    def __init__(self, spec: Spec, *, width: int = 6, network: nn.Module | None = None) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(spec.channels + 1, width)
        self.network = network
        self.hidden = nn.Linear(width, width)
        self.leave = nn.Linear(width, spec.channels)
        self.labels = nn.Embedding(spec.classes + 1, width)
        self.calls: list[frozenset[str]] = []

    def forward(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Any,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Tensor]:
        self.calls.append(want)
        grid = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2)
        level = torch.zeros(len(x)).to(x) if u is None else u
        tokens = self.enter(torch.cat([tokens, level[:, None, None].expand(-1, tokens.shape[1], 1)], -1))
        if condition is not None:
            tokens = tokens + self.labels(condition)[:, None]
        if self.network is not None:
            tokens = self.network.blocks(tokens)["patches"]  # type: ignore[operator]
        hidden = tokens + torch.tanh(self.hidden(tokens))
        if want == {"hidden:1"}:
            return {"hidden:1": hidden}
        return {"hidden:1": hidden, "prediction": self.leave(hidden).transpose(1, 2).unflatten(2, grid)}


@dataclass(frozen=True)
class Whole:
    """A view of K noisy copies, or of the value as it is."""

    field: str = "image"
    crops: int | None = 1

    def __call__(self, value: Any) -> Tensor:
        x = torch.as_tensor(value)
        return (
            x
            if self.crops is None
            else torch.stack([x + 0.1 * torch.randn(x.shape).to(x) for _ in range(self.crops)])
        )


class WholeView(Whole):
    """The same, as a stack's `views:` builds it."""

    def __init__(self, spec: Spec, *, field: str = "image", crops: int | None = 1) -> None:
        super().__init__(field, crops)


@dataclass(frozen=True)
class Some:
    """Hides a share of the places, a different number in every row."""

    view: str
    share: float = 0.4

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        draws = clock.uniform("some", rows, crops, math.prod(grid))
        return (draws < self.share).transpose(0, 1)  # (R, K, N) -> (K, R, N)
