"""The engine's clock: progress, draws keyed by (seed, step, instance, name), and collectives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def keyed(*parts: object) -> int:
    """A 63-bit seed from any values; distinct values give distinct streams."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward sums the cotangents of all and keeps this process's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)  # (R, ...) -> (W*R, ...)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        start = dist.get_rank() * ctx.rows
        return grad[start : start + ctx.rows]


class _Total(torch.autograd.Function):
    """Sum over processes; its backward is the same sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clone()
        dist.all_reduce(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


@dataclass(frozen=True, slots=True)
class StepClock:
    """The clock of one step, one instance and one micro-batch.

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
        device: where draws end up.
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
        return replace(self, instance=instance, crops=crops)

    def rng(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(keyed(self.seed, self.step, self.instance, name))

    def positions(self, rows: int) -> Tensor:
        """Row j of micro-batch m of process w is global row w + W (m + A j)."""
        return self.rank + self.world * (self.micro + self.micros * torch.arange(rows))

    def normal(self, name: str, *shape: int) -> Tensor:
        return self._dealt(torch.randn(self._whole(shape), generator=self.rng(name)), shape)

    def uniform(self, name: str, *shape: int) -> Tensor:
        return self._dealt(torch.rand(self._whole(shape), generator=self.rng(name)), shape)

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        rows, rest = divmod(shape[0], self.crops)
        assert rest == 0, f"{shape[0]} rows are no multiple of {self.crops} crops"
        return (rows * self.world * self.micros, self.crops, *shape[1:])

    def _dealt(self, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.world * self.micros > 1:
            whole = whole[self.positions(shape[0] // self.crops)]
        return whole.flatten(0, 1).to(self.device)  # (R, K, ...) -> (R*K, ...)

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
