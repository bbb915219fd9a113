"""The engine's clock: progress, draws keyed by (seed, step, instance, name), and collectives."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vtp_core.peers import PULSE

_STEP = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea and Flood 2014)
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def keyed(*parts: object) -> int:
    """A 63-bit seed from any values; distinct values give distinct streams."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _bits(key: int, counters: Tensor) -> Tensor:
    """64 random bits for every counter (int64) of the stream ``key``; ``counters`` is overwritten."""
    z = counters.mul_(_signed(_STEP)).add_(key)
    for shift, factor in _MIX:
        z ^= (z >> shift).bitwise_and_(
            (1 << (64 - shift)) - 1
        )  # the shift is arithmetic, the mask makes it logical
        if factor != 1:
            z.mul_(_signed(factor))
    return z


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward sums the cotangents of all and keeps this process's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        with PULSE.collective():
            dist.all_gather(parts, x)
        return torch.cat(parts)  # (R, ...) -> (W*R, ...)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        with PULSE.collective():
            dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


class _Total(torch.autograd.Function):
    """Sum over processes; its backward is the same sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.contiguous().clone()
        with PULSE.collective():
            dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        with PULSE.collective():
            dist.all_reduce(grad)
        return grad


@dataclass(frozen=True, slots=True)
class StepClock:
    """The clock of one step, one instance and one micro-batch.

    A draw is a function of its key and of the row's place in the global batch alone, so that every
    process makes its own rows, on its own device, and a forward over fewer rows meets the same draws.

    Args:
        seed: of the run.
        step: optimizer steps taken.
        steps: of the whole run.
        instance: who draws; two instances never share a stream.
        world: processes.
        rank: index of this process.
        micro: index of the micro-batch.
        micros: micro-batches per step.
        crops: rows of a draw that belong to one sample; a forward over (R*K, ...) draws K a sample.
        device: where draws are made.
    """

    seed: int = 0
    step: int = 0
    steps: int = 1
    instance: str = ""
    world: int = 1
    rank: int = 0
    micro: int = 0
    micros: int = 1
    crops: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def share(self) -> float:
        return min(self.step / max(self.steps, 1), 1.0)

    def of(self, instance: str, crops: int = 1) -> StepClock:
        """The same clock with another instance's streams."""
        return StepClock(
            self.seed, self.step, self.steps, instance, self.world, self.rank, self.micro, self.micros, crops,
            self.device,
        )  # fmt: skip

    def _key(self, name: str) -> int:
        return keyed(self.seed, self.step, self.instance, name)

    def rng(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._key(name))

    def positions(self, rows: int) -> Tensor:
        """Row j of micro-batch m of process w is global row w + W (m + A j)."""
        return self.rank + self.world * (self.micro + self.micros * torch.arange(rows))

    def normal(self, name: str, *shape: int) -> Tensor:
        bits = self._drawn(name, shape)
        radius = (((bits >> 32) + (2**31 + 1)).float() * 2.0**-32).log_().mul_(-2).sqrt_()  # from (0, 1]
        angle = bits.bitwise_and_(2**32 - 1).float() * (2.0**-32 * 2 * math.pi)
        return radius.mul_(angle.cos_())  # Box and Muller

    def uniform(self, name: str, *shape: int) -> Tensor:
        return (self._drawn(name, shape) >> 40).add_(2**23).float() * 2.0**-24

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """64 bits for every element of ``shape``, by the element's place in the global batch."""
        samples, rest = divmod(shape[0], self.crops)
        if rest:
            raise ValueError(
                f"{self.instance}: draw {name!r} of {shape[0]} rows, no multiple of {self.crops} crops"
            )
        each = self.crops * math.prod(shape[1:])  # elements that belong to one sample
        first = self.rank + self.world * self.micro
        stride = self.world * self.micros
        stop = first + samples * stride
        rows = torch.arange(first, stop, stride, device=self.device).mul_(each)  # (R,)
        places = rows[:, None] + torch.arange(each, device=self.device)  # (R,) -> (R, each)
        return _bits(self._key(name), places).view(shape)

    def gather(self, x: Tensor) -> Tensor:
        if self.world == 1:
            return x
        gathered: Tensor = _Gather.apply(x)
        return gathered

    def total(self, x: Tensor) -> Tensor:
        if self.world == 1:
            return x
        summed: Tensor = _Total.apply(x)
        return summed


class GivenClock(StepClock):
    """A clock whose draw ``noise`` is given; later draws are one for all rows, so that rows differ by theirs alone."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(instance="generate", device=noise.device)
        object.__setattr__(self, "noise", noise)

    def normal(self, name: str, *shape: int) -> Tensor:
        given: Tensor = object.__getattribute__(self, "noise")
        if name == "noise":
            return given.clone()
        return super().normal(name, 1, *shape[1:]).expand(shape)
