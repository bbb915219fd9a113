"""The loader's worker processes: deaf to signals, missed when they die, gone when the loader is."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Any, Self

from vtp_core.stopping import SIGNALS

PATIENCE = 2.0  # seconds that a worker has to end by itself


def prepare(_: int) -> None:
    """Let a worker outlive an interrupt, so that the main process can finish its step and its checkpoint."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end(made: Iterator[Any]) -> None:
    """End the workers behind a ``DataLoader``'s iterator; one that hangs would hold up the exit for ever."""

    def kill() -> None:
        for worker in getattr(made, "_workers", ()):
            worker.kill()

    impatient = threading.Timer(PATIENCE, kill)
    impatient.daemon = True
    impatient.start()
    getattr(made, "_shutdown_workers", lambda: None)()
    impatient.cancel()


def cause(made: Iterator[Any], error: Exception) -> str:
    """What ended a worker: a signal's name where there is one, else what torch says."""
    words = str(error)  # torch may have reaped the process, so that its exit code is nowhere else
    said = [n for n in signal.valid_signals() if f"signal: {signal.strsignal(n)}." in words]
    codes = [] if said else _codes(getattr(made, "_workers", ()))
    for number in [*said, *(-code for code in codes if code is not None and code < 0)]:
        hint = "; /dev/shm is too small" if number == signal.SIGBUS else ""
        return f"it was killed by {signal.Signals(number).name}{hint}"
    return words.partition("\n")[0] or type(error).__name__


def _codes(workers: Sequence[Any]) -> list[int | None]:
    """Exit codes, once one of them has one: a pipe may break a moment before its process has ended."""
    ending = wait([worker.sentinel for worker in workers], PATIENCE)
    for worker in workers:
        if worker.sentinel in ending:  # its files are closed, which comes a moment before its exit code
            worker.join(PATIENCE)
    return [worker.exitcode for worker in workers]


class Deaths:
    """Tells of a worker's death where its batch is waited for.

    torch's own handler raises wherever the main thread happens to be, such as between two optimizers.
    """

    def __init__(self) -> None:
        self._torch: Any = None
        self._waiting = self._seen = False

    def __enter__(self) -> Self:
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._torch = handler
            signal.signal(signal.SIGCHLD, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._torch is not None:
            signal.signal(signal.SIGCHLD, self._torch)

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """A time in which the death of a worker, also an earlier one, raises torch's ``RuntimeError``."""
        self._waiting = True
        try:
            if self._seen:
                self._torch(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        if self._waiting:
            self._torch(number, frame)
