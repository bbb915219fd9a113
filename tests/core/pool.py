"""Processes joined over gloo that live as long as the test session: only the first call waits for a start."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE = 1.0  # seconds that the others get once one process failed


class Pool:
    """Calls a function in each of `world` processes at once; they start at the first call.

    After a failure of any kind the processes are killed, and the next call starts new ones.
    """

    def __init__(self, world: int = 2) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""

    def __call__(self, function: Callable[..., Any] | str, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Results by rank. What was raised in a process is raised here, with its traceback as a note.

        Args:
            function: at the top level of a test file or of a module beside it, or ``"module.function"``; it
                asks ``torch.distributed`` for its rank.
            *args: anything that pickles.
            timeout: seconds, after which the processes that hang are shown and all of them killed.
        """
        module, name, file = _place(function)
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((module, name, file, args)))
            return self._results(f"{module}.{name}", time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="pool-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, self.world, self._folder, theirs))
            process.start()
            theirs.close()  # or the pipe would not end with the process
            self._processes.append(process)
            self._pipes.append(ours)

    def _results(self, what: str, deadline: float) -> list[Any]:
        found: dict[int, Any] = {}
        failed: dict[int, BaseException] = {}
        while pending := {p: r for r, p in enumerate(self._pipes) if r not in found and r not in failed}:
            ready = wait(list(pending), max(deadline - time.monotonic(), 0))
            if not ready:
                break
            for rank in sorted(pending[pipe] for pipe in ready if isinstance(pipe, Connection)):
                fine, value = self._received(rank)
                (found if fine else failed)[rank] = value
                deadline = deadline if fine else min(deadline, time.monotonic() + GRACE)
        if failed:
            rank, error = next(iter(failed.items()))  # the first; others fail because of it
            error.add_note(f"in {what}, process {rank} of {self.world}")
            raise error
        if pending:
            raise TimeoutError(f"{what} hangs in " + "\n".join(map(self._stack, pending.values())))
        return [found[rank] for rank in range(self.world)]

    def _received(self, rank: int) -> tuple[bool, Any]:
        try:
            fine, value, trace = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            return False, RuntimeError(f"it died with exit code {self._processes[rank].exitcode}")
        if not fine:
            value.add_note(trace)
        return fine, value

    def _stack(self, rank: int) -> str:
        """Where a process is."""
        os.kill(self._processes[rank].pid, signal.SIGRTMIN)
        time.sleep(0.5)
        return f"process {rank}:\n{Path(self._folder, f'{rank}.stack').read_text()}"

    def close(self) -> None:
        """End the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            pipe.close()
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _place(function: Callable[..., Any] | str) -> tuple[str, str, str | None]:
    """Module, name and file of a function; pytest gives a test file no place in the import path."""
    if isinstance(function, str):
        module, _, name = function.rpartition(".")
        return module, name, None
    return function.__module__, function.__qualname__, inspect.getsourcefile(function)


def _worker(rank: int, world: int, folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.register(signal.SIGRTMIN, Path(folder, f"{rank}.stack").open("w"))  # noqa: SIM115
    warnings.filterwarnings("error", module=r"vtp_.*")  # as pytest has it
    multiprocessing.set_start_method("fork", force=True)  # as a command's own processes are started
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with contextlib.suppress(EOFError):  # the session has ended
        while True:
            module, name, file, args = pickle.loads(pipe.recv_bytes())
            torch.manual_seed(0)
            try:
                message = (True, _found(module, name, file)(*args), "")
            except BaseException as error:
                message = (False, _sendable(error), traceback.format_exc())
            pipe.send_bytes(pickle.dumps(message))


def _found(module: str, name: str, file: str | None) -> Callable[..., Any]:
    if module not in sys.modules:
        spec = importlib.util.find_spec(module) if file is None else None
        spec = spec or importlib.util.spec_from_file_location(module, str(file))
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    function: Callable[..., Any] = getattr(sys.modules[module], name)
    return function


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error
