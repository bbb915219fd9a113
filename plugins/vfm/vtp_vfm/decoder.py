"""RAE's decoder (arXiv 2510.11690, section 3): the ViT of MAE (arXiv 2111.06377) over latents of a frozen encoder."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp_core.modalities import MEAN, STD
from vtp_core.teachers.frozen import SIGNED
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec
from vtp_vfm.ranges import Range, check_pictures

Count = Annotated[int, Field(gt=0)]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 192, "depth": 4, "heads": 3},
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
    "xl": {"width": 1152, "depth": 28, "heads": 16, "hidden": 4096},
}


class Block(nn.Module):
    """Pre-norm attention and a GELU feed-forward.

    Args:
        width: D.
        heads: attention heads.
        hidden: width of the feed-forward.
        eps: of the norms.
    """

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D)."""
        rows = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = rows.permute(2, 0, 3, 1, 4)  # (B, N, 3, heads, d) -> 3 x (B, heads, N, d)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class RAEDecoder(nn.Module):
    """Linear map of the latent, a learned token in front, fixed positions, blocks, norm, and pixels of every token.

    Another number of tokens is resized bilinearly to the decoder's own grid behind the linear map. Its patch may
    be another than the encoder's: twice that gives pictures of twice the size.

    Outputs: ``decoded``, and ``decoder.hidden:k``, the patch tokens after block k without the final norm.

    Args:
        spec: channels and grid of the latent, and the patch.
        size: a published size, ``b l xl``, or ``tiny s``; the next four options win over it.
        width: D.
        depth: blocks.
        heads: attention heads.
        hidden: width of the feed-forward; None is 4 D.
        patch: pixels along the side of what a token becomes; None takes the encoder's.
        grid: tokens along each axis; None takes the spec's.
        range: ``normalised`` by ImageNet's mean and deviation, or ``signed``, [-1, 1], of what the last matrix
            gives: RAE's is the encoder's.
        eps: of the norms.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {dial: {"size": dial} for dial in SIZES}

    def __init__(
        self,
        spec: Spec,
        *,
        size: Literal["tiny", "s", "b", "l", "xl"] = "xl",
        width: Count | None = None,
        depth: Count | None = None,
        heads: Count | None = None,
        hidden: Count | None = None,
        patch: Count | None = None,
        grid: tuple[Count, Count] | None = None,
        range: Literal["normalised", "signed"] = "normalised",
        eps: Annotated[float, Field(gt=0)] = 1e-12,
    ) -> None:
        super().__init__()
        check_pictures(spec)
        shape = SIZES[size]
        hidden = hidden or (4 * width if width else shape.get("hidden", 4 * shape["width"]))
        width, depth, heads = width or shape["width"], depth or shape["depth"], heads or shape["heads"]
        if width % heads or width % 4:
            raise ValueError(f"width: {width} must be a multiple of 4 and of heads: {heads}")
        if patch is None and spec.patch[0] != spec.patch[1]:
            raise ValueError(f"patch: the encoder's {spec.patch} is no square; name one")
        self.channels, self.width, self.depth = spec.channels, width, depth
        self.patch = patch or spec.patch[0]
        self.grid = tuple(grid or spec.grid)
        self.proj_in = nn.Linear(spec.channels, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in itertools.repeat(None, depth))
        self.norm = nn.LayerNorm(width, eps)
        self.proj_out = nn.Linear(width, 3 * self.patch**2)
        self.range = Range(MEAN, STD) if range == "normalised" else Range(*SIGNED)
        self.register_buffer("places", positions(self.grid, width), persistent=False)
        self.apply(_reset)

    places: Tensor

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the weight that makes pixels."""
        return {"last": cast(nn.Parameter, self.proj_out.weight)}

    def forward(
        self, z: Tensor, *, want: frozenset[str] = frozenset({"decoded"}), clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """Latents z (B, C, h, w); arguments as in :class:`vtp_plugins.protocols.Decoder`."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(f"the decoder reads (B, {self.channels}, h, w), not {tuple(z.shape)}")
        levels = {output: self._level(output) for output in want}
        found: dict[str, Tensor] = {}
        x = self.embedded(z)
        for level in range(1, max(levels.values()) + 1):
            x = self.blocks[level - 1](x)
            if f"decoder.hidden:{level}" in want:
                found[f"decoder.hidden:{level}"] = x[:, 1:]
        if "decoded" in want:
            found["decoded"] = self.range.left(self._pixels(self.proj_out(self.norm(x)[:, 1:])))
        return found

    def embedded(self, z: Tensor) -> Tensor:
        """Latents to tokens on the decoder's grid with the learned one in front, (B, 1 + N, D)."""
        x = self.proj_in(z.flatten(2).transpose(1, 2))  # (B, C, h, w) -> (B, h w, D)
        if tuple(z.shape[2:]) != self.grid:
            x = x.transpose(1, 2).unflatten(2, z.shape[2:])  # -> (B, D, h, w)
            x = F.interpolate(x, size=self.grid, mode="bilinear", align_corners=False)
            x = x.flatten(2).transpose(1, 2)
        # the learned token has no place
        x = torch.cat([self.token.to(x.dtype).expand(len(x), -1, -1), x + self.places.to(x.dtype)], dim=1)
        return x

    def _level(self, output: str) -> int:
        name, _, block = output.partition(":")
        if name == "decoder.hidden" and block.isdecimal() and 1 <= int(block) <= self.depth:
            return int(block)
        if output == "decoded":
            return self.depth
        raise LookupError(
            f"the decoder has no output {output!r}; it gives decoded, decoder.hidden:k, k up to {self.depth}"
        )

    def _pixels(self, x: Tensor) -> Tensor:
        """Tokens (B, N, P P 3), by row, column and channel, to pictures (B, 3, H, W)."""
        height, width = self.grid
        x = x.unflatten(1, (height, width)).unflatten(3, (self.patch, self.patch, 3))
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, h, w, p, q, 3) -> (B, 3, h, p, w, q)
        return x.reshape(len(x), 3, height * self.patch, width * self.patch)


def positions(grid: tuple[int, ...], width: int) -> Tensor:
    """Fixed sines, then cosines of the column, then of the row, (N, D) float32.

    At frequencies 10^4 ** (-i / n), n = D / 4 (MAE, arXiv 2111.06377).
    """
    count = width // 4
    waves = 1e4 ** (-torch.arange(count, dtype=torch.float64) / count)
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * waves for side in grid)  # (side, n)
    row = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, grid[1], -1)
    column = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(grid[0], -1, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def _reset(module: nn.Module) -> None:
    """Draw matrices as MAE does: N(0, 0.02^2), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
