"""What the benchmarks measure with: a stack's engine on random batches, alternating clocks, allocated bytes."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vtp_core import load_stack
from vtp_core.build import blueprint, build
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs

WORDS = "a smiling face with heart eyes red cat waving hand of the woman running clock at two o'clock flag"
PLAIN = ["objectives.reconstruction.trunk=random", "objectives.reconstruction.allow_random_trunk=true"]


def engine_of(stack: str, overrides: Sequence[str] = ()) -> Engine:
    """The engine of a stack, without data, hooks and outside weights."""
    loaded = load_stack(stack, [*overrides])
    return Engine(build(blueprint(loaded)), loaded.train, loaded.data.batch_size)


def batch_of(engine: Engine, seed: int = 0) -> Inputs:
    """A batch of noise in the shapes that the engine asks its loader for; captions are words."""
    torch.manual_seed(seed)
    draw, spec, views = random.Random(seed), engine.model.spec, {}
    for name, rows in sorted(engine.layout.rows_by_view().items()):
        view = engine.model.views[name]
        if view.field == "text":
            captions = [" ".join(draw.choices(WORDS.split(), k=draw.randint(2, 7))) for _ in range(rows)]
            views[name] = torch.stack([view(caption) for caption in captions])  # (R, L)
        else:
            shape = view(torch.zeros(spec.signal_channels, *spec.size, dtype=torch.uint8)).shape
            views[name] = torch.randint(256, (rows, *shape), dtype=torch.uint8)
    return Inputs(views, {})


def seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call."""
    began = clock()
    call()
    return clock() - began


def alternating(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    warm: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of every call by round; calls take turns, so that what else the machine does meets all of them.

    With one thread, ``time.process_time`` also leaves out the time in which others have the processor.
    """
    for _ in range(warm):
        for call in calls:
            call()
    return [[seconds(call, clock) for call in calls] for _ in range(rounds)]


def median_ratio(rows: Sequence[Sequence[float]], over: int = 0, under: int = 1) -> float:
    """Median over rounds of the ratio of two calls."""
    return statistics.median(row[over] / row[under] for row in rows)


def product(rows: int, inner: int, columns: int) -> Callable[[], Any]:
    """A matrix product to be timed, of 2 * rows * inner * columns FLOP."""
    a, b, c = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return lambda: torch.mm(a, b, out=c)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of CPU tensors that a call held at once, beyond what was there before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    found = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that autograd kept for a backward at one time; each storage once, parameters not at all."""
    users: dict[int, int] = {}
    held = peak = 0

    class Kept:
        """Counts a storage as long as it lives."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor, self.storage = tensor, tensor.untyped_storage()
            self.key = 0 if tensor.is_leaf and tensor.requires_grad else self.storage._cdata
            users[self.key] = users.get(self.key, 0) + 1
            if self.key and users[self.key] == 1:
                held += self.storage.nbytes()
                peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            users[self.key] -= 1
            if self.key and not users[self.key]:
                held -= self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        call()
    return peak


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def resident_peak(call: Callable[[], Any]) -> int:
    """Growth of this process's memory to its highest point in a call; for fresh processes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = resident()
    call()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return peak * 1024 - before
