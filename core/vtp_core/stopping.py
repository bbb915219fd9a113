"""Signals that ask a command to end: between steps at once, inside one after it; asked twice, at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from vtp_core.errors import Fault

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(Fault):
    """A run was asked to stop, and can be continued.

    Args:
        message: what is saved, and how to go on.
        code: exit code, 75 or 130.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Interrupted(BaseException):
    """A signal ends what is being done; nobody's ``except Exception`` stops it.

    Attributes:
        code: exit code, 130 for an interrupt from the keyboard, else 75.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 130 if number == signal.SIGINT else 75


def interrupt(number: int) -> None:
    """Raise :class:`Interrupted`; the handler of a command that has nothing to save."""
    raise Interrupted(number)


@contextlib.contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
    """Call ``handler`` for each signal that would end the process; one that is ignored (nohup) stays so."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda received, _: handler(received))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stopping:
    """Whether a run was asked to stop, and when it may.

    Attributes:
        asked: the first signal that came; None before.
        twice: whether another followed.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.twice = False
        self._resting = False

    def __call__(self, number: int) -> None:
        """Take a signal: the handler for :func:`handled`."""
        self.twice = self.asked is not None
        self.asked = number if self.asked is None else self.asked
        if self._resting or self.twice:
            raise Interrupted(self.asked)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came."""
        if self.asked is not None:
            raise Interrupted(self.asked)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """A time in which a signal may raise anywhere, as the run's state is whole and not being written."""
        self._resting = True
        try:
            self.check()
            yield
        finally:
            self._resting = False
