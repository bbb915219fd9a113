"""Teacher targets of self-distillation: Sinkhorn-Knopp, or a softmax around a centre (arXiv 2104.14294)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vtp_core.nn.chunked import Targets, row_log_sum_exp, wide
from vtp_core.nn.sinkhorn import sinkhorn
from vtp_plugins.clock import Clock


class Centering(nn.Module):
    """Turns a teacher's features into targets at the temperature of the moment.

    Args:
        prototypes: K.
        form: ``sinkhorn`` or ``softmax``.
        temperature: at the start of the run and after the warm-up, which is linear.
        warmup: share of the run over which the temperature moves.
        momentum: of the centre; only softmax has one.
    """

    centre: Tensor

    def __init__(
        self,
        prototypes: int,
        form: Literal["sinkhorn", "softmax"] = "sinkhorn",
        temperature: tuple[float, float] = (0.04, 0.07),
        warmup: float = 0.3,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.form, self.temperature, self.warmup, self.momentum = form, temperature, warmup, momentum
        if form == "softmax":
            self.register_buffer("centre", torch.zeros(prototypes))

    def temperature_at(self, share: float) -> float:
        """Teacher temperature at a share of the run."""
        first, last = self.temperature
        return first + (last - first) * (min(share / self.warmup, 1.0) if self.warmup else 1.0)

    @torch.no_grad()
    def forward(self, x: Tensor, weight: Tensor, clock: Clock, pending: dict[str, Tensor]) -> Targets:
        """Targets by the centre from before this batch, whose own mean waits in ``pending``.

        Args:
            x: teacher features, (T, d).
            weight: the teacher's prototypes, (K, d).
            clock: progress and sums over processes.
            pending: the objective's; sums and counts of micro-batches add up.
        """
        temperature = self.temperature_at(clock.share)
        if self.form == "sinkhorn":
            return sinkhorn(x, weight, temperature, clock)
        x, weight = wide(x), wide(weight)
        for name, value in {"sum": weight @ x.sum(0), "count": x.new_tensor(len(x))}.items():
            pending[name] = pending[name] + value if name in pending else value
        x, column = x / temperature, -self.centre.to(x) / temperature
        return Targets(x, weight, column, -row_log_sum_exp(x, weight, column))

    @torch.no_grad()
    def settle(self, pending: dict[str, Tensor], clock: Clock) -> None:
        """Merge the step's mean score of each prototype into the centre."""
        if "sum" in pending:
            mean = clock.total(pending["sum"]) / clock.total(pending["count"]).clamp(min=1)
            self.centre.lerp_(mean.to(self.centre), 1 - self.momentum)
