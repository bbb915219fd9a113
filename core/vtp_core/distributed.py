"""Collectives of a step: gradients averaged in flat buckets, and verdicts that all processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET = 64 * 2**20  # bytes


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def start(device: torch.device, timeout: float = 600.0) -> None:
    """Join the other processes when torchrun started this one; verdicts travel over gloo on any device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average over processes; where only some have a gradient, the others count as zero.

    A gradient that no process has stays None, so that optimizers skip it as a single process would.
    """
    world = world_size()
    if world == 1 or not parameters:
        return
    has = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device
    )
    dist.all_reduce(has, dist.ReduceOp.MAX)
    used = [parameter for parameter, flag in zip(parameters, has.tolist(), strict=True) if flag]
    for bucket in _buckets(used):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= world
        for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = grad.view_as(parameter)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > _BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def agreed(flag: bool) -> bool:
    """Whether any process says so; all get the same answer."""
    if world_size() == 1:
        return flag
    raised = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def gathered(value: Any) -> list[Any]:
    """Every process's value by rank, on every process."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def told(value: str | None) -> str:
    """The first process's value, on every process."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]
