"""Our ViT encoder: rotary positions, drop-path per forward, only what is read computed (arXiv 2512.13687)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp_core.models.block import Block, Ffn, Norm, Reads, norm_of, reset
from vtp_core.models.rope import Rope, RopeDtype, Tables
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec

Sizes = dict[str, dict[str, Any]]
SIZES: Sizes = {
    "tiny": {"width": 128, "depth": 4, "heads": 2},
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
    "l": {"width": 1024, "depth": 24, "heads": 16},
}


class PatchEmbed(nn.Module):
    """A linear map of every patch: the strided convolution of a ViT, as one matrix product."""

    def __init__(self, channels: int, patch: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * math.prod(patch), width)

    def reset(self) -> None:
        """Draw from U(-k, k) with k = fan_in ** -0.5, as a convolution's default does."""
        bound = self.proj.in_features**-0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.patch)
        split = [part for side, p in zip(x.shape[2:], self.patch, strict=True) for part in (side // p, p)]
        grid, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
        x = x.reshape(*x.shape[:2], *split).permute(0, *grid, 1, *inner)  # -> (B, *grid, ch, *patch)
        x = x.flatten(axes + 1).flatten(1, axes)  # -> (B, N, ch * P)
        return self.proj(x)  # type: ignore[no-any-return]


class ViT(nn.Module):
    """An encoder of any signal on a grid whose size is a multiple of the patch.

    Outputs: ``cls`` and ``patches`` after the final norm, ``patches@NAME`` likewise at selected places, and
    ``hidden:k`` and ``hidden.cls:k``, patch tokens and CLS token after block k without the final norm.

    Args:
        spec: modality, channels and number of axes of the signal.
        patch: stride of a token, one number or one per axis.
        image_size: size of the signal in training, one number or one per axis.
        width: D.
        depth: blocks.
        heads: attention heads; VTP's have 64 channels.
        mlp_ratio: hidden width of the feed-forward over D, before SwiGLU's factor 2/3.
        ffn: kind of feed-forward; the number aligns SwiGLU's hidden width.
        norm: kind of norm.
        qk_norm: RMSNorm on queries and keys.
        layer_scale: initial factor of the residual branches; None has none.
        drop_path: share of rows that a residual branch leaves out in training.
        rope_dtype: ``bfloat16`` rounds angles, queries and keys as released VTP weights expect.
    """

    sizes: ClassVar[Sizes] = SIZES

    def __init__(
        self,
        spec: Spec,
        *,
        patch: int | tuple[int, ...] = 16,
        image_size: int | tuple[int, ...] = 256,
        width: Annotated[int, Field(gt=0)] = 128,
        depth: Annotated[int, Field(gt=0)] = 4,
        heads: Annotated[int, Field(gt=0)] = 2,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        ffn: Ffn = "swiglu",
        norm: Norm = "rmsnorm",
        qk_norm: bool = True,
        layer_scale: float | None = None,
        drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        rope_dtype: RopeDtype = "float32",
    ) -> None:
        super().__init__()
        axes = len(spec.size)
        self.patch = _per_axis("patch", patch, axes)
        self.size = _per_axis("image_size", image_size, axes)
        self.width, self.depth, self.channels, self.drop_path = width, depth, spec.signal_channels, drop_path
        self.grid_of(self.size)
        self.patch_embed = PatchEmbed(spec.signal_channels, self.patch, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, ffn, norm, qk_norm, layer_scale) for _ in range(depth)
        )
        self.norm = norm_of(norm, width)
        self.rope = Rope(width // heads, axes, rope_dtype)
        self.reset()

    def reset(self) -> None:
        """Draw the parameters anew."""
        reset(self)
        self.patch_embed.reset()
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.zeros_(self.mask_token)

    @property
    def anchors(self) -> Mapping[str, nn.Parameter]:
        """``last``: the last weight before the final norm."""
        return {"last": self._block(self.depth).mlp.last}

    def grid_of(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each axis of a signal.

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        pairs = list(zip(size, self.patch, strict=True))
        if any(side % p or side < p for side, p in pairs):
            raise ValueError(
                f"encoder.image_size: {_times(size)} is not a multiple of encoder.patch "
                f"{_times(self.patch)}; change one of them"
            )
        return tuple(side // p for side, p in pairs)

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
        """Features of x (B, ch, *size); arguments as in :class:`vtp_plugins.protocols.Encoder`."""
        if x.ndim != 2 + len(self.patch) or x.shape[1] != self.channels:
            raise ValueError(f"the encoder reads (B, {self.channels}, *size), not {tuple(x.shape)}")
        grid = self.grid_of(tuple(x.shape[2:]))
        want = {"cls": len(x), "patches": len(x)} if want is None else want
        rows = self._rows(want)
        keep, scale = self._kept(x, self.drop_path if drop is None else drop, clock)
        out: dict[str, Tensor] = {}
        tokens = self._embed(x[: rows[0]], mask)
        tables = self.rope.tables(grid, tokens, prefix=1)
        for level, needed in enumerate(rows, start=1):
            tokens = tokens[:needed]  # rows that only earlier blocks were read for are done
            kept = None if keep is None else keep[:needed, level - 1]
            if level == self.depth:
                return out | self._last(tokens, tables, want, select or {}, kept, scale)
            tokens = self._block(level)(tokens, tables, kept, scale)
            out |= _hidden(tokens, level, want)
        return out

    def _rows(self, want: Mapping[str, int]) -> list[int]:
        """Rows that each block must compute, up to the last block that anything is read from."""
        levels: dict[int, int] = {}
        for output, rows in want.items():
            level = self._level(output)
            levels[level] = max(levels.get(level, 0), rows)
        last = max(levels)
        return [max(rows for at, rows in levels.items() if at >= level) for level in range(1, last + 1)]

    def _level(self, output: str) -> int:
        name, _, block = output.partition(":")
        if name in {"hidden", "hidden.cls"} and block.isdecimal() and 1 <= int(block) <= self.depth:
            return int(block)
        if output in {"cls", "patches"} or output.startswith("patches@"):
            return self.depth
        raise LookupError(
            f"the encoder has no output {output!r}; it gives cls, patches, patches@MASK, "
            f"hidden.cls:k and hidden:k, k up to {self.depth}"
        )

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.patch_embed(x)  # -> (B, N, D)
        if mask is not None:
            tokens = torch.where(mask[: len(x), :, None], self.mask_token.to(tokens.dtype), tokens)
        cls = self.cls_token.to(tokens.dtype).expand(len(x), -1, -1)
        return torch.cat([cls, tokens], dim=1)  # -> (B, 1 + N, D)

    def _kept(self, x: Tensor, rate: float, clock: Clock | None) -> tuple[Tensor | None, float]:
        """Rows that each branch of each block reaches, (B, depth, 2) bool, and the scale that makes up."""
        if clock is None or not self.training or rate == 0.0:
            return None, 1.0
        # drawn for every row and block, so that what is read does not change what is drawn
        draws = clock.uniform("drop_path", len(x), self.depth, 2).to(x.device)
        return draws >= rate, 1.0 / (1.0 - rate)

    def _last(
        self,
        tokens: Tensor,
        tables: Tables,
        want: Mapping[str, int],
        select: Mapping[str, Tensor],
        keep: Tensor | None,
        scale: float,
    ) -> dict[str, Tensor]:
        """Outputs of the last block: whole rows as far as patches are read, single tokens beyond."""
        block, count = self._block(self.depth), tokens.shape[1]
        whole = max(want.get(o, 0) for o in ("patches", f"hidden:{self.depth}", f"hidden.cls:{self.depth}"))
        full = tokens[:0]
        if whole:
            full = block(tokens[:whole], tables, None if keep is None else keep[:whole], scale)
        out = _hidden(full, self.depth, want)
        if "patches" in want:
            out["patches"] = self.norm(full[: want["patches"], 1:])
        reads = self._reads(want, select, count, tokens.device)
        beyond = {output: _beyond(output, at, whole, tokens) for output, at in reads.items()}
        singles = [tokens[:0, 0]] * len(reads)
        if any(len(at) for at in beyond.values()):
            most = sum(1 if output == "cls" else count - 1 for output in reads)
            rest = None if keep is None else keep[whole:]
            single = block.read(
                tokens[whole:], Reads(torch.cat(list(beyond.values())), count, most), tables, rest, scale
            )
            singles = list(single.split([len(at) for at in beyond.values()]))
        for (output, at), single in zip(reads.items(), singles, strict=True):
            out[output] = self.norm(_merged(full, single, at) if whole else single)
        return out

    def _reads(
        self, want: Mapping[str, int], select: Mapping[str, Tensor], count: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Flat places in (B * T) of the tokens that are read singly, by output."""
        reads = {}
        for output, rows in want.items():
            name = output.removeprefix("patches@")
            if output == "cls":
                reads[output] = count * torch.arange(rows, device=device)
            elif name != output:
                if name not in select:
                    raise LookupError(f"{output}: no places were given; select holds {sorted(select)}")
                at = select[name].to(device)
                reads[output] = at + at // (count - 1) + 1  # a CLS token comes before every row's patches
        return reads

    def _block(self, level: int) -> Block:
        block = self.blocks[level - 1]
        assert isinstance(block, Block)
        return block


def _hidden(tokens: Tensor, level: int, want: Mapping[str, int]) -> dict[str, Tensor]:
    """What is wanted of the tokens (R, 1 + N, D) after a block."""
    found = {f"hidden:{level}": tokens[:, 1:], f"hidden.cls:{level}": tokens[:, 0]}
    return {output: x[: want[output]] for output, x in found.items() if output in want}


def _beyond(output: str, at: Tensor, whole: int, tokens: Tensor) -> Tensor:
    """Flat places past the rows that are computed whole, counted from there."""
    edge = whole * tokens.shape[1]
    if whole >= len(tokens):
        return at[:0]
    if output == "cls":
        return at[whole:] - edge  # one per row in order, so a slice
    return at[at >= edge] - edge if whole else at


def _merged(full: Tensor, single: Tensor, at: Tensor) -> Tensor:
    """Tokens at flat places, (Q, D): of the whole rows (b, T, D) or, past them, the single ones in order."""
    pool = full.flatten(0, 1)  # (b, T, D) -> (b * T, D)
    if not len(single):
        return pool.index_select(0, at)
    beyond = at >= len(pool)
    return torch.cat([pool, single]).index_select(
        0, torch.where(beyond, len(pool) + beyond.cumsum(0) - 1, at)
    )


def _per_axis(option: str, value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    sides = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(sides) != axes:
        raise ValueError(f"{option}: {_times(sides)} names {len(sides)} axes; the signal has {axes}")
    return sides


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
