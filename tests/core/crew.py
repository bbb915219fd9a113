"""Real processes of one run, started within a second: forked from a server that has read the libraries once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
PLUGIN = ["--plugin", str(HERE / "mishaps.py")]
STACK = """
modality: image
size: tiny
data: {use: slides, batch_size: 8, workers: 0}
encoder: {use: vit, patch: 8, image_size: 32, width: 32, depth: 1, heads: 2}
bottleneck: {use: linear, channels: 8}
decoder: {use: vit_pixels, width: 32, depth: 1, heads: 2}
objectives:
  reconstruction: {lpips: 0.0}
train: {steps: 2000, checkpoint_every: 1000, timeout: 60.0}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _child(environment: dict[str, str], output: str, arguments: list[str]) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process of its own
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    torch.set_num_threads(1)
    from vtp_core.cli import main

    main(arguments)


class Crew:
    """``vtp ARGUMENTS`` in several processes that meet at a port; killed at the end of the ``with``.

    Args:
        folder: their outputs go here, one file a process.
        arguments: of the command.
        world: how many.
    """

    def __init__(self, folder: Path, *arguments: str, world: int = 2) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["vtp_core.training", "vtp_core.cli", "vtp_reconstruction"])
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._outputs = [folder / f"output.{rank}" for rank in range(world)]
        self.processes: list[Any] = []
        for rank, output in enumerate(self._outputs):
            output.unlink(missing_ok=True)
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = server.Process(target=_child, args=(environment, str(output), list(arguments)))
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if error is not None:
            error.add_note("\n".join(f"process {r}:\n{self.said(r)}" for r in range(len(self.processes))))

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def codes(self, within: float, *ranks: int) -> list[int | None]:
        """Exit codes by rank, None of a process that is still there after so many seconds."""
        until = time.monotonic() + within
        chosen = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        for process in chosen:
            process.join(max(until - time.monotonic(), 0))
        return [process.exitcode for process in chosen]

    def said(self, rank: int) -> str:
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""


class Launch:
    """``torchrun ... -m vtp_core ARGUMENTS``, in a session of its own; ``meet``: how launchers find each other."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        world: int = 2,
        options: Sequence[str] = (),
        meet: Sequence[str] = ("--standalone",),
    ) -> None:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *meet,
            f"--nproc-per-node={world}",
        ]
        self.output, self._mark = folder / "output", f"CREW={uuid.uuid4()}"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*torchrun, *options, "-m", "vtp_core", *arguments],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CREW": self._mark.removeprefix("CREW=")},
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        orphans = self.workers()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        if error is not None:
            error.add_note(self.said())

    def said(self) -> str:
        return self.output.read_text()

    def workers(self) -> list[int]:
        """Processes that torchrun has started and that live, by rank; those of a loader come after all ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                words = (entry / "environ").read_text().split("\0")
            except OSError:
                continue
            ranks = [int(word.removeprefix("RANK=")) for word in words if word.startswith("RANK=")]
            if self._mark in words and ranks and state != "Z":
                found.append((ranks[0], int(entry.name)))
        return [pid for _, pid in sorted(found)]


def until(condition: Callable[[], object], within: float = 60.0) -> None:
    """Wait for something."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def rows(run: Path) -> int:
    """Steps that a run has written down."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def write_stack(folder: Path) -> str:
    path = folder / "slides.yaml"
    path.write_text(STACK)
    return str(path)
