"""Components that fail on purpose, named on the command line with ``--plugin``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core.data.order import permutation
from vtp_core.data.views import Plain
from vtp_plugins import Clock, Need, Objective, Outputs, Spec
from vtp_plugins.hookspecs import hookimpl


def _lookup() -> None:
    raise KeyError("codebook")


def _leave() -> None:
    raise SystemExit(9)


def _gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _memory() -> None:
    torch.empty(10**15)


WAYS: dict[str, Callable[[], None]] = {
    "lookup": _lookup,
    "leave": _leave,
    "gpu_memory": _gpu_memory,
    "memory": _memory,
    "disk": lambda: os.close(os.open("/dev/full/x", os.O_RDONLY)),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "twice": lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)] and None,  # type: ignore[func-returns-value]
}


class Fails(Objective):
    """Fails once, in the step that follows ``at`` steps."""

    def __init__(self, spec: Spec, *, way: str = "lookup", at: int = 2) -> None:
        super().__init__()
        self.needs, self.views = {"x": Need("image", "cls")}, {"image": Plain(spec)}
        self.way, self.at = way, at

    def forward(self, got: dict[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        if clock.step == self.at:
            WAYS[self.way]()
        return {"size": got["x"]["cls"].float().square().mean()}


class Hook:
    """Fails at one event."""

    def __init__(self, spec: Spec, *, event: str, way: str = "lookup", at: int = 2) -> None:
        self.event, self.way, self.at = event, way, at

    def _fail(self, event: str) -> None:
        if event == self.event:
            WAYS[self.way]()

    @hookimpl
    def vtp_build(self, engine: Any) -> None:
        self._fail("build")

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Clock, metrics: Mapping[str, float]) -> None:
        if metrics["step"] + 1 >= self.at:
            self._fail("step")

    @hookimpl
    def vtp_probe(self, engine: Any, step: int, readings: Sequence[Any]) -> None:
        self._fail("probe")

    @hookimpl
    def vtp_finish(self, run: Path) -> None:
        self._fail("finish")


class Probe:
    """Fails where the tokenizer is in eval mode."""

    fields: frozenset[str] = frozenset()

    def __init__(self, spec: Spec, *, way: str = "lookup") -> None:
        self.way = way

    def __call__(self, tokenizer: Any, bench: Any) -> list[Any]:
        WAYS[self.way]()
        return []


class Data:
    """Pictures of one colour; from the 20th sample read on, a worker hangs or dies, or every process fails."""

    fields = frozenset({"image", "name"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train",)
    names: Mapping[str, Sequence[str]] = {}

    def __init__(self, spec: Spec, split: str = "train", *, way: str = "none") -> None:
        self.way, self.reads = way, 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        worker = torch.utils.data.get_worker_info() is not None
        if worker and self.reads > 20 and self.way == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if worker and self.reads > 20 and self.way == "hang":
            time.sleep(1000)
        if self.way == "fail":
            raise KeyError("index")
        shape = (3, 40, 40) if self.way != "flat" else (40, 40)
        return {"image": torch.full(shape, index, dtype=torch.uint8), "name": str(index)}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        return "faulty"


PLUGINS = {
    "objectives": {"fails": Fails},
    "hooks": {"hook": Hook},
    "probes": {"failing": Probe},
    "datasets": {"faulty": Data},
}
