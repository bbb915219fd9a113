"""Processes of a run: how they join, gradients averaged in flat buckets, and verdicts that all share."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from vtp_core.errors import Fault, StackFault
from vtp_core.peers import PULSE, PeerFault

_BUCKET = 64 * 2**20  # bytes
_ARRIVAL = 300.0  # seconds that a start may take at least: machines read libraries at different speeds
_SLACK = 30.0  # seconds that NCCL, which would end the process itself, leaves to the heartbeat
_ASKED, _INTERRUPTED, _FAULT = 1, 2, 3  # what a process says at an agreement; the largest number holds


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def restarts() -> int:
    """How often torchrun has started this run's processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start(device: torch.device, timeout: float = 600.0) -> None:
    """Join the other processes when torchrun started this one; verdicts travel over gloo on any device.

    Every attempt of torchrun has keys of its own in the launcher's store: with those of the last one,
    processes would meet addresses of the dead.

    Args:
        device: where the run computes.
        timeout: seconds that a collective may take.

    Raises:
        PeerFault: some processes did not come.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        return
    rank = int(_variable("RANK"))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store = PrefixStore(f"vtp/attempt-{restarts()}", _store(rank, timeout))
    _assemble(store, rank, world, max(timeout, _ARRIVAL))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=PrefixStore("c10d", store), rank=rank,
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


def _variable(name: str) -> str:
    if name not in os.environ:
        raise StackFault(
            f"WORLD_SIZE is set in the environment, {name} is not; start several processes with: "
            "torchrun --nproc-per-node N -m vtp_core train STACK"
        )
    return os.environ[name]


def launched() -> bool:
    """Whether a launcher outlives the processes and keeps a store for them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(rank: int, timeout: float = _ARRIVAL) -> Store:
    """The store that processes meet at: the launcher's, else the first process's own."""
    store: Store = TCPStore(
        _variable("MASTER_ADDR"), int(_variable("MASTER_PORT")), is_master=rank == 0 and not launched(),
        timeout=timedelta(seconds=max(timeout, _ARRIVAL)), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    return store


def _assemble(store: Store, rank: int, world: int, patience: float) -> None:
    """Wait until every process is there, in turns between which signals are heard."""
    keys, until, nap = [f"here/{other}" for other in range(world)], time.monotonic() + patience, 0.02
    store.set(keys[rank], "")
    while not store.check(keys):
        if time.monotonic() > until:
            absent = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            raise PeerFault(
                f"process {', '.join(absent)} of {world} did not come within {patience:.0f} s; start the run again",
                75,
            )
        time.sleep(nap)
        nap = min(2 * nap, 0.5)


def remember(number: int, run: str) -> None:
    """Leave a run's directory with the launcher, for the processes that it starts when these have died.

    Args:
        number: of the run, as a program may train several one after another.
        run: its directory.
    """
    if launched():
        PrefixStore("vtp", _store(-1)).set(f"run-{number}", f"{restarts()} {run}")


def begun(number: int) -> str | None:
    """The directory of the run that an earlier attempt of this launcher began; the same on every process."""
    if not restarts() or not launched():
        return None
    store = PrefixStore("vtp", _store(-1))
    found = store.get(f"run-{number}").decode() if store.check([f"run-{number}"]) else ""
    attempt, _, run = found.partition(" ")
    return run if run and int(attempt) < restarts() else None  # another process of this one may be quicker


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
        return fault if fault is not None else PeerFault(f"process {rank} failed: {text}", code)
    return {0: None, _ASKED: asked or signal.SIGTERM, _INTERRUPTED: signal.SIGINT}[found]


def of_collective(error: BaseException) -> bool:
    """Whether an exception says that a collective or the store failed, as they do when a process has gone."""
    said = isinstance(error, RuntimeError) and "gloo/" in str(error)  # as gloo names its files
    return said or isinstance(error, dist.DistError)
