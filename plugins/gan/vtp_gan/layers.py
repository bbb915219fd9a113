"""Layers of critics that keep state: they leave what they learn in ``pending``, and settle it once a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core.nn.chunked import wide
from vtp_core.nn.precision import full_precision
from vtp_plugins.clock import Clock

Norm = Literal["batch", "sample", "group", "actnorm", "none"]
MOMENTUM = 0.1  # of running statistics


@dataclass(frozen=True, slots=True)
class Turn:
    """One pass through a critic.

    Attributes:
        clock: of the step.
        pending: where layers leave what :meth:`Layer.settle` merges.
        batch: batch norms read the batch's statistics, and not the running ones.
        learns: spectral norms take a step of power iteration.
        directions: of spectral norms by layer, where earlier passes of this turn left them.
    """

    clock: Clock
    pending: dict[str, Tensor]
    batch: bool = True
    learns: bool = True
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Layer(nn.Module):
    """A layer that is told whose turn it is; ``key`` tells it apart in ``pending``."""

    key: str = ""

    def settle(self, pending: Mapping[str, Tensor]) -> None:
        """Merge what this step's passes left."""


class Chain(nn.ModuleList):
    """Layers in order."""

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        for layer in self:
            x = layer(x, turn) if isinstance(layer, Layer | Chain) else layer(x)
        return x


class BatchNorm(Layer):
    """Batch norm over the rows of all processes (arXiv 1502.03167); keys as torch's.

    Args:
        channels: C.
        eps: added to variances.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """Maps (B, C, ...)."""
        if not turn.batch:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        if turn.clock.world == 1:  # a momentum of 1 gives the batch's own mean and unbiased variance
            x = F.batch_norm(x, mean, var, self.weight, self.bias, True, 1.0, self.eps)
        else:
            x = self._of_all(x, turn.clock, mean, var)
        seen = torch.stack([mean, var])[:, None]  # (2, 1, C)
        before = turn.pending.get(self.key, seen[:, :0])
        turn.pending[self.key] = torch.cat([before, seen], 1)  # (2, passes, C)
        return x

    def _of_all(self, x: Tensor, clock: Clock, mean: Tensor, var: Tensor) -> Tensor:
        """Normalised by statistics of all processes, which are written to ``mean`` and ``var``."""
        dims, shape = [0, *range(2, x.ndim)], (1, -1, *([1] * (x.ndim - 2)))
        count = clock.world * x.numel() // x.shape[1]
        with full_precision(x):
            x = wide(x)
            centre = clock.total(x.sum(dims)) / count  # (C,)
            x = x - centre.view(shape)
            spread = clock.total(x.square().sum(dims)) / count
            mean.copy_(centre.detach())
            var.copy_(spread.detach() * (count / max(count - 1, 1)))
            scale = (spread + self.eps).rsqrt() * self.weight
            return x * scale.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def settle(self, pending: Mapping[str, Tensor]) -> None:
        """Running statistics move once for every pass."""
        if self.key in pending:
            for mean, var in pending[self.key].unbind(1):
                self.running_mean.lerp_(mean, MOMENTUM)
                self.running_var.lerp_(var, MOMENTUM)
                self.num_batches_tracked += 1


class ActNorm(Layer):
    """An affine map whose first batch leaves it with mean 0 and deviation 1 (arXiv 1807.03039).

    Args:
        channels: C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """Maps (B, C, ...)."""
        loc: Tensor = self.loc
        scale: Tensor = self.scale
        if not self.initialized:
            if self.key not in turn.pending:
                turn.pending[self.key] = self._shift(x.detach(), turn.clock)
            shift = turn.pending[self.key]
            loc, scale = loc + shift[0].view_as(loc), scale + shift[1].view_as(scale)
        shape = (1, -1, *([1] * (x.ndim - 2)))
        return scale.view(shape) * (x + loc.view(shape))

    @torch.no_grad()
    def _shift(self, x: Tensor, clock: Clock) -> Tensor:
        """What loc and scale lack to normalise this batch of all processes, (2, C)."""
        with full_precision(x):
            x = wide(x).transpose(0, 1).flatten(1)  # (B, C, ...) -> (C, n)
            count = clock.world * x.shape[1]
            mean = clock.total(x.sum(1)) / count
            square = clock.total((x - mean[:, None]).square().sum(1)) / max(count - 1, 1)
            return torch.stack(
                [-mean - self.loc.flatten(), 1 / (square.sqrt() + 1e-6) - self.scale.flatten()]
            )

    @torch.no_grad()
    def settle(self, pending: Mapping[str, Tensor]) -> None:
        """Both parameters move, by as much wherever an optimizer has taken them meanwhile."""
        if self.key in pending:
            self.loc.add_(pending[self.key][0].view_as(self.loc))
            self.scale.add_(pending[self.key][1].view_as(self.scale))
            self.initialized.fill_(1)


class SpectralConv(Layer):
    """A 1-d convolution over its largest singular value (arXiv 1802.05957), circular; keys as torch's.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: taps, odd.
    """

    weight_u: Tensor
    weight_v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel)
        self.weight_orig, self.bias = nn.Parameter(conv.weight.detach()), conv.bias
        self.pad = kernel // 2
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(inputs * kernel), dim=0))

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """Tokens (B, inputs, N) to (B, outputs, N)."""
        with full_precision(x):
            u, v = self._directions(turn)
            weight = self.weight_orig / (u @ (self.weight_orig.flatten(1) @ v))
        if self.pad:
            x = F.pad(x, (self.pad, self.pad), mode="circular")
        return F.conv1d(x, weight, self.bias)

    @torch.no_grad()
    def _directions(self, turn: Turn) -> tuple[Tensor, Tensor]:
        # every turn starts from the buffers: micro-batches must not see each other's steps
        u, v = turn.directions.get(self.key, (self.weight_u, self.weight_v))
        if turn.learns:
            matrix = self.weight_orig.flatten(1)
            v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
            u = F.normalize(matrix @ v, dim=0, eps=1e-12)
            turn.directions[self.key] = u, v
            turn.pending.update({f"{self.key}.u": u, f"{self.key}.v": v})
        return u, v

    def settle(self, pending: Mapping[str, Tensor]) -> None:
        """The last pass's directions stay."""
        if f"{self.key}.u" in pending:
            self.weight_u.copy_(pending[f"{self.key}.u"])
            self.weight_v.copy_(pending[f"{self.key}.v"])


def norm_of(norm: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """A norm over maps (B, C, ...); ``sample`` takes every sample and channel on its own."""
    if norm == "batch":
        return BatchNorm(channels, eps)
    if norm == "actnorm":
        return ActNorm(channels)
    if norm == "none":
        return nn.Identity()
    return nn.GroupNorm(channels if norm == "sample" else math.gcd(32, channels), channels, eps)


def named(critic: nn.Module) -> None:
    """Give every layer its place in the critic as its key."""
    for name, module in critic.named_modules():
        if isinstance(module, Layer):
            module.key = f"critic.{name}"
