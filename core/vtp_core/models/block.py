"""The pre-norm transformer block of our ViTs and its attention, as VTP has them (arXiv 2512.13687)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.models.fused import gate, heads, rms_norm
from vtp_core.models.rope import Tables

Norm = Literal["rmsnorm", "layernorm", "layernormbf16"]
Ffn = Literal["swiglu", "swiglu32", "swiglu64", "swiglu128", "mlp"]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: normalise in float32, cast back, then scale."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def norm_of(kind: Norm, width: int) -> nn.Module:
    """A norm over the last axis, by its name."""
    if kind == "rmsnorm":
        return RMSNorm(width)
    return nn.LayerNorm(width, eps=1e-5 if kind == "layernormbf16" else 1e-6)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), at two thirds of the hidden width rounded up to a multiple of ``align``."""

    def __init__(self, width: int, ratio: float, align: int) -> None:
        super().__init__()
        hidden = -(-int(int(width * ratio) * 2 / 3) // align) * align
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.w3 = nn.Linear(hidden, width)

    @property
    def last(self) -> nn.Parameter:
        return cast(nn.Parameter, self.w3.weight)

    def forward(self, x: Tensor) -> Tensor:
        # two products measured faster on CPU than one over both weights
        return self.w3(gate(self.w1(x), self.w2(x)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """fc2(gelu(fc1 x))."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    @property
    def last(self) -> nn.Parameter:
        return cast(nn.Parameter, self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@dataclass(frozen=True, slots=True)
class Reads:
    """Single tokens of x (B, T, D).

    Args:
        at: flat places in (B * T), (Q,) int64.
        tokens: T.
        most: no row is read more often.
    """

    at: Tensor
    tokens: int
    most: int

    @property
    def row(self) -> Tensor:
        return self.at // self.tokens

    @property
    def place(self) -> Tensor:
        return self.at % self.tokens

    def of(self, x: Tensor) -> Tensor:
        """The tokens, (Q, D)."""
        return x.flatten(0, 1).index_select(0, self.at)  # (B, T, D) -> (Q, D)

    def slots(self) -> tuple[Tensor, int]:
        """Places in (B * slots), one for every read, (Q,), and how many slots a row needs."""
        row = self.row
        if self.most == 1:
            return row, 1
        ordered, order = row.sort(stable=True)
        ranks = torch.arange(len(row), device=row.device) - torch.searchsorted(ordered, ordered)
        # an accelerator would have to wait for the exact number
        slots = int(ranks.max()) + 1 if row.device.type == "cpu" and len(row) else self.most
        return row * slots + torch.empty_like(ranks).scatter_(0, order, ranks), slots

    def among(self, keep: Tensor) -> tuple[Tensor, Reads]:
        """Which reads (q,) are of kept rows (B,) bool, and those reads with kept rows counted from 0."""
        picked = keep[self.row].nonzero().squeeze(1)
        skipped = (~keep).cumsum(0)[self.row[picked]]
        return picked, Reads(self.at[picked] - skipped * self.tokens, self.tokens, self.most)


class Attention(nn.Module):
    """Self-attention with rotated, optionally RMS-normalised, queries and keys."""

    def __init__(self, width: int, count: int, qk_norm: bool) -> None:
        super().__init__()
        if width % count:
            raise ValueError(f"heads: {count} does not divide the width {width}")
        self.heads = count
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // count) if qk_norm else None
        self.k_norm = RMSNorm(width // count) if qk_norm else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        scales = None
        if self.q_norm is not None and self.k_norm is not None:
            scales = self.q_norm.weight, self.k_norm.weight
        q, k, v = heads(self.qkv(x), self.heads, scales, 1e-5, tables)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).flatten(2)  # (B, heads, T, d) -> (B, T, D)
        return self.proj(y)  # type: ignore[no-any-return]

    def read(self, x: Tensor, reads: Reads, tables: Tables) -> Tensor:
        """The same at the tokens that are read: x (B, T, D) to (Q, D)."""
        rows, width = x.shape[0], x.shape[2]
        weights, biases = self.qkv.weight.split([width, 2 * width]), self.qkv.bias.split([width, 2 * width])
        q = F.linear(reads.of(x), weights[0], biases[0]).unflatten(-1, (self.heads, -1))  # -> (Q, heads, d)
        k, v = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = tables.at(reads.place).rotate(q).to(v.dtype), tables.rotate(k).to(v.dtype)
        slot, slots = reads.slots()
        q = q.new_zeros(rows * slots, width).index_copy(0, slot, q.flatten(1))
        q = q.view(rows, slots, self.heads, width // self.heads).transpose(1, 2)  # -> (B, heads, slots, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows * slots, width)
        return self.proj(y.index_select(0, slot))  # type: ignore[no-any-return]  # (B * slots, D) -> (Q, D)


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x).

    Drop-path computes a branch on the kept rows only and scales it by the inverse of their expected share.

    Attributes:
        entries: methods that compute it, for who recomputes or shards it.
    """

    entries: ClassVar[tuple[str, ...]] = ("forward", "read")

    def __init__(
        self,
        width: int,
        count: int,
        mlp_ratio: float = 4.0,
        ffn: Ffn = "swiglu",
        norm: Norm = "rmsnorm",
        qk_norm: bool = True,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_of(norm, width)
        self.attn = Attention(width, count, qk_norm)
        self.ls1 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = norm_of(norm, width)
        self.mlp: SwiGLU | MLP = MLP(width, mlp_ratio)
        if ffn != "mlp":
            self.mlp = SwiGLU(width, mlp_ratio, int(ffn.removeprefix("swiglu") or 8))
        self.ls2 = LayerScale(width, layer_scale) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, tables: Tables, keep: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Tokens x (B, T, D) to the same shape.

        Args:
            x: tokens.
            tables: angles of the T tokens.
            keep: (B, 2) bool, rows that the attention and the feed-forward branch reach; None is all.
            scale: of a branch where rows are dropped.
        """
        kept = (None, None) if keep is None else tuple(rows.nonzero().squeeze(1) for rows in keep.unbind(1))
        x = _residual(x, lambda y: self.ls1(self.attn(self.norm1(y), tables)), kept[0], scale)
        return _residual(x, lambda y: self.ls2(self.mlp(self.norm2(y))), kept[1], scale)

    def read(
        self, x: Tensor, reads: Reads, tables: Tables, keep: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """The same at the tokens that are read, (Q, D); only keys and values are made of all tokens."""
        y = reads.of(x)
        if keep is None:
            y = y + self.ls1(self.attn.read(self.norm1(x), reads, tables))
            return y + self.ls2(self.mlp(self.norm2(y)))  # type: ignore[no-any-return]
        picked, among = reads.among(keep[:, 0])
        kept = x[keep[:, 0].nonzero().squeeze(1)]
        y = _residual(y, lambda _: self.ls1(self.attn.read(self.norm1(kept), among, tables)), picked, scale)
        picked, _ = reads.among(keep[:, 1])
        return _residual(y, lambda z: self.ls2(self.mlp(self.norm2(z))), picked, scale)


def _residual(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor | None, scale: float) -> Tensor:
    """x plus the branch, which is computed at the kept indices of the first axis only."""
    if kept is None:
        return x + branch(x)
    return x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=scale)


def reset(module: nn.Module) -> None:
    """Draw linear layers as VTP does: truncated normal of deviation 0.02, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
