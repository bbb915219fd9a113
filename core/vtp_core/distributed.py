"""Processes of a run: how they join, gradients averaged in flat buckets, and verdicts that all share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from vtp_core import joining
from vtp_core.errors import Fault
from vtp_core.joining import launched as launched
from vtp_core.peers import PULSE, PeerFault

_BUCKET = 64 * 2**20  # bytes
_SLACK = 30.0  # seconds that NCCL, which would end the process itself, leaves to the heartbeat
_ASKED, _INTERRUPTED, _FAULT = 1, 2, 3  # what a process says at an agreement; the largest number holds
_attempt: joining.Attempt | None = None  # in which this process met the others


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def restarts() -> int:
    """How often the launcher has started all processes of this run again; the same on every process."""
    return _attempt.number if _attempt else 0


def job() -> str | None:
    """Name of everything that this process's launcher starts; None of a process that was started alone."""
    return _attempt.job if _attempt else None


def start(device: torch.device, timeout: float = 600.0) -> None:
    """Join the other processes when a launcher started this one; verdicts travel over gloo on any device.

    Args:
        device: where the run computes.
        timeout: seconds that a collective may take.

    Raises:
        PeerFault: some processes did not come.
        StackFault: the launcher's variables are incomplete or wrong.
    """
    global _attempt
    rank, world = joining.place()
    if dist.is_initialized() or (world == 1 and (_attempt or not launched())):
        return
    cuda = world > 1 and device.type == "cuda"
    if cuda:
        torch.cuda.set_device(joining.whole("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0)
    _attempt = joining.join(rank, world, timeout)
    if world > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore("c10d", _attempt.own), rank=rank,
            world_size=world, timeout=timedelta(seconds=timeout + _SLACK * cuda),
        )  # fmt: skip


def command() -> list[str]:
    """How ``vtp`` is started in as many processes as this run has; on several machines, as it was on each."""
    world = world_size()
    if world == 1:
        return ["vtp"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = [f"--nnodes={world // local}"] if world > local else []
    return ["torchrun", *nodes, f"--nproc-per-node={local}", "-m", "vtp_core"]


def remember(number: int, run: str) -> None:
    """Leave a run's directory with the launcher, for the processes that it starts when these have died.

    Args:
        number: of the run, as a program may train several one after another.
        run: its directory.
    """
    if _attempt:
        _attempt.remember(number, run)


def begun(number: int) -> tuple[str | None, bool]:
    """The directory that an earlier attempt of this launcher claimed, and whether it made a run in it.

    All processes learn the same, of the first one, when they join.
    """
    if _attempt is None:
        return None, False
    return _attempt.runs.get(str(number)), str(number) in _attempt.made


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
    with PULSE.collective():
        dist.all_reduce(has, dist.ReduceOp.MAX)
    used = [parameter for parameter, flag in zip(parameters, has.tolist(), strict=True) if flag]
    for bucket in _buckets(used):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        with PULSE.collective():
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
        with PULSE.collective():
            dist.all_reduce(values)
        values /= world_size()
    return values


def agreed(flag: bool) -> bool:
    """Whether any process says so; all get the same answer."""
    return bool(_most(int(flag)))


def _most(value: int) -> int:
    """The largest of all processes' numbers, each from 0 to 255."""
    if world_size() == 1:
        return value
    byte = torch.tensor([value], dtype=torch.uint8)
    with PULSE.collective():
        dist.all_reduce(byte, dist.ReduceOp.MAX)
    return int(byte.item())


def gathered(value: Any) -> list[Any]:
    """Every process's value by rank, on every process."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with PULSE.collective():
        dist.all_gather_object(found, value)
    return found


def told(value: str | None) -> str:
    """The first process's value, on every process."""
    box = [value]
    if world_size() > 1:
        with PULSE.collective():
            dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def verdict(asked: int | None = None, fault: Fault | None = None) -> int | Fault | None:
    """Why all processes stop here, the same on each; None where they go on. A fault outweighs a signal.

    Args:
        asked: a signal that came to this process.
        fault: what this process met.

    Returns:
        A process's own fault to itself and a :class:`PeerFault` of the same exit code to the others;
        an interrupt if any process got one; another signal.
    """
    own = _INTERRUPTED if asked == signal.SIGINT else _ASKED if asked else 0
    found = _most(_FAULT if fault is not None else own)
    if found == _FAULT:
        said = gathered(None if fault is None else (fault.code, str(fault)))
        rank, (code, text) = next((rank, pair) for rank, pair in enumerate(said) if pair is not None)
        return fault if fault is not None else PeerFault(f"process {rank} failed: {text}", code, known=True)
    return {0: None, _ASKED: asked or signal.SIGTERM, _INTERRUPTED: signal.SIGINT}[found]


def of_collective(error: BaseException) -> bool:
    """Whether an exception says that a collective or the store failed, as they do when a process has gone."""
    said = isinstance(error, RuntimeError) and "gloo/" in str(error)  # as gloo names its files
    return said or isinstance(error, dist.DistError)
