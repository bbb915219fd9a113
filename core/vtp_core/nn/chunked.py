"""Losses over a wide matrix of scores, x @ weight.T, that is computed block by block and never held whole.

Cross-entropy against a teacher needs two things of the student's scores s = x W^T: ``log sum_k exp s_k``,
and ``sum_k p_k s_k = x . (sum_k p_k W_k)``. Both are reductions over k, so blocks of columns suffice; the
backward pass computes each block again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtp_core.nn.precision import full_precision
from vtp_plugins.clock import Clock

_SMALLEST, _LARGEST = 2**20, 2**24  # elements of a block: 1 MiB is still in cache, 64 MiB fills a GPU


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Columns of a (rows, columns) matrix in slices of about a thirty-second of it, within sane bounds."""
    elements = min(_LARGEST, max(_SMALLEST, rows * columns // 32))
    step = max(1, elements // max(rows, 1))
    return (slice(start, min(start + step, columns)) for start in range(0, columns, step))


@dataclass(frozen=True, slots=True)
class Targets:
    """Teacher probabilities exp(x @ weight.T + column + row), (T, K), kept in factors.

    Attributes:
        x: teacher features over the temperature, (T, d).
        weight: its prototypes, (K, d).
        column: (K,).
        row: (T,).
    """

    x: Tensor
    weight: Tensor
    column: Tensor
    row: Tensor

    def block(self, columns: slice) -> Tensor:
        """Probabilities of some prototypes, (T, k)."""
        scores = torch.addmm(self.column[columns], self.x, self.weight[columns].T)  # (T, d) -> (T, k)
        return scores.add_(self.row[:, None]).exp_()

    def dense(self) -> Tensor:
        """All of them, (T, K)."""
        return self.block(slice(None))


def row_log_sum_exp(x: Tensor, weight: Tensor, column: Tensor | None = None) -> Tensor:
    """log sum_k exp(x . weight_k + column_k), (S,); without gradient."""
    top = x.new_full((len(x),), -torch.inf)
    total = torch.zeros_like(top)
    for columns in blocks(len(x), len(weight)):
        scores = x @ weight[columns].T  # (S, d) -> (S, k)
        if column is not None:
            scores += column[columns]
        new = torch.maximum(top, scores.amax(1))
        total = total * (top - new).exp() + scores.sub_(new[:, None]).exp_().sum(1)
        top = new
    return top + total.log()


class _Reduce(torch.autograd.Function):
    """``log_sum_exp`` or sum of ``softplus`` of each row of x @ weight.T + bias; and targets @ weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets | None, form: str
    ) -> tuple[Tensor, Tensor]:
        ctx.targets, ctx.form = targets, form
        with full_precision(x):
            if form == "log_sum_exp":
                rows = row_log_sum_exp(x, weight)
            else:
                rows = x.new_zeros(len(x))
                for columns in blocks(len(x), len(weight)):
                    rows += F.softplus(_scores(x, weight[columns], bias)).sum(1)
            mean = x.new_zeros(0 if targets is None else len(targets.x), x.shape[1])
            if targets is not None:
                for columns in blocks(len(targets.x), len(weight)):
                    mean.addmm_(targets.block(columns), weight[columns])  # (T, k) (k, d) -> (T, d)
        ctx.save_for_backward(x, weight, bias, rows)
        return rows, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, rows = ctx.saved_tensors
        grad_rows, grad_mean = grads
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias)
        targets = ctx.targets
        height = max(len(x), 0 if targets is None else len(targets.x))
        with full_precision(x):
            for columns in blocks(height, len(weight)):
                part = weight[columns]
                slope = _scores(x, part, bias)  # (S, k)
                slope = slope.sub_(rows[:, None]).exp_() if ctx.form == "log_sum_exp" else slope.sigmoid_()
                slope *= grad_rows[:, None]
                if grad_x is not None:
                    grad_x.addmm_(slope, part)
                if grad_weight is not None:
                    torch.mm(slope.T, x, out=grad_weight[columns])
                    if targets is not None:
                        grad_weight[columns].addmm_(targets.block(columns).T, grad_mean)
                if grad_bias is not None:
                    grad_bias += slope.sum()
        return grad_x, grad_weight, grad_bias, None, None


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scores = x @ weight.T  # (S, d) (k, d) -> (S, k)
    return scores if bias is None else scores.add_(bias)


def log_sum_exp(x: Tensor, weight: Tensor) -> Tensor:
    """log sum_k exp(x . weight_k), (S,), differentiable."""
    rows: Tensor = _Reduce.apply(wide(x), wide(weight), None, None, "log_sum_exp")[0]
    return rows


def softplus_sum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum_k log(1 + exp(x . weight_k + bias)), (S,), differentiable."""
    rows: Tensor = _Reduce.apply(wide(x), wide(weight), wide(bias), None, "softplus")[0]
    return rows


def cross_entropy_terms(x: Tensor, weight: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """What cross-entropies between students and teachers are made of.

    The cross-entropy of student s against teacher t is ``normaliser[s] - x[s] . mean[t]``.

    Args:
        x: student features over the temperature, (S, d).
        weight: the student's prototypes, (K, d).
        targets: T teachers.

    Returns:
        normaliser (S,) and mean (T, d), both differentiable.
    """
    normaliser, mean = _Reduce.apply(wide(x), wide(weight), None, targets, "log_sum_exp")
    return normaliser, mean


def contrastive(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    clock: Clock,
    bias: Tensor | None = None,
    form: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """CLIP's loss (arXiv 2103.00020) or SigLIP's (2303.15343) with negatives from all processes.

    Each process holds its own rows against everybody's columns, so the mean over processes is the whole
    batch's loss, and so are averaged gradients.

    Args:
        a: normalised features, (R, E).
        b: their partners, (R, E).
        scale: factor of the scores, a scalar.
        clock: gathers.
        bias: added to the scores of the sigmoid form, a scalar.
        form: which loss.
    """
    a, b = wide(a), wide(b)
    own = scale * (a * b).sum(1)  # (R,)
    if form == "sigmoid":
        shift = a.new_zeros(()) if bias is None else wide(bias)
        return (softplus_sum(scale * a, clock.gather(b), shift) - own - shift).mean()
    to_b = log_sum_exp(scale * a, clock.gather(b))
    to_a = log_sum_exp(scale * b, clock.gather(a))
    return ((to_b + to_a) / 2 - own).mean()
