"""The block of every diffusion transformer here, its parts and the last layer.

DiT (arXiv 2212.09748); SwiGLU, RMSNorm and RoPE as in LightningDiT (arXiv 2501.01423); without biases and with norms
on queries and keys as in DDT (arXiv 2504.05741).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.models.block import RMSNorm
from vtp_core.models.fused import gate, heads
from vtp_core.models.rope import Tables
from vtp_dit.switches import HeadNorm, Norm, Switches

EPS = 1e-6


class Attention(nn.Module):
    """Self-attention with optional norms on queries and keys, which come before the rotation."""

    def __init__(self, width: int, count: int, switches: Switches) -> None:
        super().__init__()
        if width % count:
            raise ValueError(f"heads: {count} does not divide the width {width}")
        self.heads = count
        self.qkv = nn.Linear(width, 3 * width, bias=switches.qkv_bias)
        self.q_norm = _head_norm(switches.qk_norm, width // count)
        self.k_norm = _head_norm(switches.qk_norm, width // count)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tables: Tables | None) -> Tensor:
        """Tokens x (R, N, D) to the same shape."""
        y = F.scaled_dot_product_attention(*self._heads(self.qkv(x), tables))
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # (R, heads, N, d) -> (R, N, D)

    def _heads(self, qkv: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (R, heads, N, d) each."""
        if tables is not None and not isinstance(self.q_norm, nn.LayerNorm):
            scales = None
            if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
                scales = self.q_norm.weight, self.k_norm.weight
            return heads(qkv, self.heads, scales, EPS, tables)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if tables is not None:
            q, k = tables.rotate(q), tables.rotate(k)
        return q, k, v


class GELU(nn.Module):
    """fc2(gelu(fc1 x)) in the tanh form."""

    def __init__(self, width: int, switches: Switches) -> None:
        super().__init__()
        hidden = int(width * switches.mlp_ratio)
        self.fc1 = nn.Linear(width, hidden, bias=switches.mlp_bias)
        self.fc2 = nn.Linear(hidden, width, bias=switches.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x) at two thirds of the hidden width."""

    def __init__(self, width: int, switches: Switches) -> None:
        super().__init__()
        hidden = 2 * int(width * switches.mlp_ratio) // 3
        self.w1 = nn.Linear(width, hidden, bias=switches.mlp_bias)
        self.w2 = nn.Linear(width, hidden, bias=switches.mlp_bias)
        self.w3 = nn.Linear(hidden, width, bias=switches.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        # two products measured faster on CPU than one over both weights
        return self.w3(gate(self.w1(x), self.w2(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + g1 attention(norm(x) (1 + s1) + b1), then the same with the feed-forward.

    b, s and g are linear in the activated condition: one for all tokens, or one for each.
    """

    def __init__(self, width: int, count: int, switches: Switches) -> None:
        super().__init__()
        self.shift = switches.shift
        self.norm1 = norm_of(switches.norm, width)
        self.attn = Attention(width, count, switches)
        self.norm2 = norm_of(switches.norm, width)
        self.mlp = (SwiGLU if switches.mlp == "swiglu" else GELU)(width, switches)
        self.modulation = nn.Linear(width, (6 if self.shift else 4) * width)

    def forward(self, x: Tensor, c: Tensor, tables: Tables | None) -> Tensor:
        """Tokens x (R, N, D) under c (R or 1, N or 1, D) to the same shape."""
        parts = self.modulation(c)  # -> (R or 1, N or 1, 6 D)
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts.chunk(6, dim=-1)
        else:
            (scale1, gate1, scale2, gate2), shift1, shift2 = parts.chunk(4, dim=-1), None, None
        x = torch.addcmul(x, gate1, self.attn(modulated(self.norm1(x), shift1, scale1), tables))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2(x), shift2, scale2)))


class Final(nn.Module):
    """The modulated norm and the linear map to what a token's cells are: (channel, *patch), prediction first."""

    def __init__(self, width: int, outputs: int, switches: Switches) -> None:
        super().__init__()
        self.norm = norm_of(switches.final_norm, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, outputs)
        for part in (self.modulation, self.proj):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor, c: Tensor, outputs: int) -> Tensor:
        """Tokens x (R, N, D) to their first ``outputs`` values, (R, N, outputs)."""
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        y = modulated(self.norm(x), shift, scale)
        return F.linear(y, self.proj.weight[:outputs], self.proj.bias[:outputs])


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


def norm_of(kind: Norm, width: int) -> nn.Module:
    """A norm over the last axis; only RMSNorm has a weight."""
    return (
        RMSNorm(width, eps=EPS) if kind == "rms" else nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
    )


def _head_norm(kind: HeadNorm, dim: int) -> nn.Module | None:
    if kind == "rms":
        return RMSNorm(dim, eps=EPS)
    return nn.LayerNorm(dim, eps=1e-5) if kind == "layer" else None
