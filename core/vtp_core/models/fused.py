"""RMSNorm, SwiGLU's gate and the preparation of heads, with backwards that keep and move less than usual.

The plain form of each is its definition. The hand-written form serves eager float32 and float64 on the CPU,
where a step is bound by memory traffic; everything else, ``torch.compile`` included, takes the plain form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vtp_core.models.rope import Tables

_FULL = (torch.float32, torch.float64)


def by_hand(x: Tensor) -> bool:
    """Whether x is where the hand-written forms are the faster ones."""
    return x.device.type == "cpu" and x.dtype in _FULL and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x (..., D) in float32 at least, cast back, then multiply by ``weight`` (D,)."""
    if x.dtype not in _FULL or x.dtype != weight.dtype:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    if torch.is_grad_enabled() and by_hand(x):
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def gate(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, keeping only a and b for the backward."""
    if torch.compiler.is_compiling():
        return F.silu(a) * b
    gated: Tensor = _Gate.apply(a, b)
    return gated


def heads(
    qkv: Tensor, count: int, scales: tuple[Tensor, Tensor] | None, eps: float, tables: Tables
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, normalised and rotated.

    Args:
        qkv: (B, T, 3 * D).
        count: heads.
        scales: weights of the queries' and the keys' RMSNorm, (head_dim,) each; None does not normalise.
        eps: of that norm.
        tables: angles of the T tokens.

    Returns:
        q, k and v, each (B, heads, T, head_dim).
    """
    if by_hand(qkv) and tables.cos.dtype == qkv.dtype:
        weight = None if scales is None else torch.stack(scales)
        made: tuple[Tensor, Tensor, Tensor] = _Heads.apply(qkv, weight, tables.cos, tables.sin, count, eps)
        return made
    q, k, v = qkv.unflatten(-1, (3, count, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # -> (B, heads, T, head_dim)
    if scales is not None:
        q, k = rms_norm(q, scales[0], eps), rms_norm(k, scales[1], eps)
    return tables.rotate(q).to(v.dtype), tables.rotate(k).to(v.dtype), v


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, inverse)
        return x.mul(inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = (grad * normed).reshape(-1, x.shape[-1])
        shared = torch.mv(product, weight).div_(-x.shape[-1]).view(inverse.shape)
        grad_x = torch.mul(grad, weight).addcmul_(normed, shared).mul_(inverse)
        return grad_x, product.sum(0), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), F.silu(a).mul_(grad)


class _Heads(torch.autograd.Function):
    """Layout, norm and rotation at once; the norm's weight is folded into the tables."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, count: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, tokens, width = qkv.shape
        dim = width // (3 * count)
        parts = qkv.view(rows, tokens, 3, count, dim).permute(2, 0, 3, 1, 4)  # -> (3, B, heads, T, dim)
        qk, inverse = parts[:2].clone(memory_format=torch.contiguous_format), None
        if weight is not None:
            mean = torch.mv(qk.square().view(-1, dim), qk.new_full((dim,), 1 / dim))
            inverse = mean.add_(eps).rsqrt_().view(*qk.shape[:-1], 1)
            qk.mul_(inverse)
        factor = 1.0 if weight is None else weight[:, None, None, None]
        q, k = _rotated(qk, cos * factor, sin * factor).unbind(0)
        ctx.save_for_backward(None if weight is None else qk, inverse, weight, cos, sin)
        return q, k, parts[2].clone(memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, weight, cos, sin = ctx.saved_tensors
        rows, count, tokens, dim = grad_q.shape
        grad = _rotated(torch.stack([grad_q, grad_k]), cos, -sin)  # (2, B, heads, T, dim)
        grad_weight = None
        if weight is not None:
            product = (grad * normed).view(2, -1, dim)
            grad_weight = product.sum(1)
            shared = torch.bmm(product, weight.unsqueeze(-1)).div_(-dim).view(inverse.shape)
            grad.mul_(weight[:, None, None, None]).addcmul_(normed, shared).mul_(inverse)
        whole = grad.new_empty(rows, tokens, 3, count, dim)
        parts = whole.permute(2, 0, 3, 1, 4)  # -> (3, B, heads, T, dim)
        parts[:2].copy_(grad)
        parts[2].copy_(grad_v)
        return whole.flatten(2), grad_weight, None, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + turned * sin, where ``sin`` may carry weights that differ between the halves."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., :half])
    return y
