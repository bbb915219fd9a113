"""Sinkhorn-Knopp targets over all processes (SwAV, arXiv 2006.09882; DINOv2, arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtp_core.nn.chunked import Targets, blocks, row_log_sum_exp, wide
from vtp_plugins.clock import Clock


@torch.no_grad()
def sinkhorn(x: Tensor, weight: Tensor, temperature: float, clock: Clock, iterations: int = 3) -> Targets:
    """Targets whose prototypes are used equally by all rows of all processes; every row sums to one.

    The plan is diag(share) exp(scores) diag(even): the iterations move two vectors, while scores are
    computed block by block. A factor common to a vector cancels, so neither K nor the batch appears.

    Args:
        x: this process's teacher features, (T, d); T may differ between processes and be 0.
        weight: the teacher's prototypes, (K, d).
        temperature: of the teacher.
        clock: sums over processes.
        iterations: each makes prototypes even, then rows.
    """
    x, weight = wide(x) / temperature, wide(weight)
    kernel = _Kernel(x, weight)
    mass, top = x.new_zeros(len(weight)), x.new_full((), -torch.inf)
    for rows, part in kernel:  # (t, K)
        new = torch.maximum(top, kernel.top[rows].max())
        mass = mass * (top - new).exp() + (kernel.top[rows] - new).exp() @ part
        top = new
    mass = mass * (top - clock.gather(top.reshape(1)).max()).exp()
    even = _even(clock.total(mass))  # (K,)
    for _ in range(iterations - 1):
        mass = torch.zeros_like(mass)
        for _, part in kernel:
            mass += (part @ even).reciprocal() @ part  # (t,) (t, K) -> (K,)
        even = _even(clock.total(mass))
    column = even.log()
    return Targets(x, weight, column, -row_log_sum_exp(x, weight, column))


def _even(mass: Tensor) -> Tensor:
    """The factors that make masses equal; their mean is fixed, so that iterations do not drift."""
    return (mass / mass.mean()).clamp(min=torch.finfo(mass.dtype).tiny).reciprocal()


class _Kernel:
    """exp(scores - their row's maximum) by blocks of rows; a single block is kept, several are made anew.

    Attributes:
        top: maximum of each row, (T,), known once the kernel was passed through.
    """

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.top = x.new_empty(len(x))
        self.rows = list(blocks(len(weight), len(x)))
        self.whole: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.rows:
            yield rows, self._part(rows)

    def _part(self, rows: slice) -> Tensor:
        if self.whole is not None:
            return self.whole
        scores = self.x[rows] @ self.weight.T  # (t, d) -> (t, K)
        self.top[rows] = scores.amax(1)
        scores = scores.sub_(self.top[rows, None]).exp_()
        if len(self.rows) == 1:
            self.whole = scores
        return scores
