"""The ViT pixel decoder: latents to pixels, with no CLS token and no output activation (arXiv 2512.13687)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, cast

from pydantic import Field
from torch import Tensor, nn

from vtp_core.models.block import Block, Ffn, Norm, norm_of, reset
from vtp_core.models.rope import Rope, RopeDtype
from vtp_core.models.vit import SIZES, Sizes
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec


class ViTPixels(nn.Module):
    """A decoder that mirrors the ViT encoder; its output is linear, in the normalised space of the signal.

    Outputs: ``decoded``, and ``decoder.hidden:k``, the tokens after block k without the final norm.

    Args:
        spec: channels of the latent and of the signal, and the patch.
        width: width of its tokens.
        depth: blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the feed-forward over ``width``, before SwiGLU's factor 2/3.
        ffn: kind of feed-forward; the number aligns SwiGLU's hidden width.
        norm: kind of norm.
        qk_norm: RMSNorm on queries and keys.
        layer_scale: initial factor of the residual branches; None has none.
        rope_dtype: ``bfloat16`` rounds angles, queries and keys as released VTP weights expect.
    """

    sizes: ClassVar[Sizes] = SIZES

    def __init__(
        self,
        spec: Spec,
        *,
        width: Annotated[int, Field(gt=0)] = 128,
        depth: Annotated[int, Field(gt=0)] = 4,
        heads: Annotated[int, Field(gt=0)] = 2,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        ffn: Ffn = "swiglu",
        norm: Norm = "layernorm",
        qk_norm: bool = True,
        layer_scale: float | None = None,
        rope_dtype: RopeDtype = "float32",
    ) -> None:
        super().__init__()
        self.width, self.depth, self.patch = width, depth, spec.patch
        self.channels, self.signal_channels = spec.channels, spec.signal_channels
        self.proj_in = nn.Linear(spec.channels, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, ffn, norm, qk_norm, layer_scale) for _ in range(depth)
        )
        self.norm = norm_of(norm, width)
        self.proj_out = nn.Linear(width, spec.signal_channels * math.prod(spec.patch))
        self.rope = Rope(width // heads, len(spec.patch), rope_dtype)
        reset(self)

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the weight that makes pixels."""
        return {"last": cast(nn.Parameter, self.proj_out.weight)}

    def forward(
        self, z: Tensor, *, want: frozenset[str] = frozenset({"decoded"}), clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """Latents z (B, C, *grid); arguments as in :class:`vtp_plugins.protocols.Decoder`."""
        if z.ndim != 2 + len(self.patch) or z.shape[1] != self.channels:
            raise ValueError(f"the decoder reads (B, {self.channels}, *grid), not {tuple(z.shape)}")
        levels = {output: self._level(output) for output in want}
        grid = tuple(z.shape[2:])
        out: dict[str, Tensor] = {}
        x = self.proj_in(z.flatten(2).transpose(1, 2))  # (B, C, *grid) -> (B, N, D)
        tables = self.rope.tables(grid, x)
        for level in range(1, max(levels.values()) + 1):
            x = self.blocks[level - 1](x, tables)
            if f"decoder.hidden:{level}" in want:
                out[f"decoder.hidden:{level}"] = x
        if "decoded" in want:
            out["decoded"] = self._unpatched(self.proj_out(self.norm(x)), grid)
        return out

    def _level(self, output: str) -> int:
        name, _, block = output.partition(":")
        if name == "decoder.hidden" and block.isdecimal() and 1 <= int(block) <= self.depth:
            return int(block)
        if output == "decoded":
            return self.depth
        raise LookupError(
            f"the decoder has no output {output!r}; it gives decoded, decoder.hidden:k, k up to {self.depth}"
        )

    def _unpatched(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        axes = len(grid)
        x = x.view(len(x), *grid, self.signal_channels, *self.patch)  # -> (B, *grid, ch, *patch)
        pairs = [axis for i in range(axes) for axis in (1 + i, 2 + axes + i)]
        x = x.permute(0, 1 + axes, *pairs)  # -> (B, ch, g, p, g, p)
        size = (g * p for g, p in zip(grid, self.patch, strict=True))
        return x.reshape(len(x), self.signal_channels, *size)
