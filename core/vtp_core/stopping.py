"""Signals that ask a command to end: between steps at once, inside one after it; asked twice, at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from vtp_core.errors import Fault

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ECHO = 1.0  # seconds in which a launcher forwards what the terminal sent to everybody already


class Preempted(Fault):
    """A run was asked to stop, and can be continued.

    Args:
        message: what is saved, and how to go on.
        code: exit code, 75 or 130.
        known: whether all processes say the same.
    """

    def __init__(self, message: str, code: int, known: bool = False) -> None:
        super().__init__(message)
        self.code, self.known = code, known


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

    def called(received: int, _: object) -> None:
        handler(received)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, called)
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is called:  # not where deaf() came between
                signal.signal(number, old)


def deaf() -> None:
    """Ignore signals from here on: a launcher sends them to whoever leaves after the first."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class Stopping:
    """Whether a run was asked to stop, and when it may.

    One of several processes must not leave by itself, as the others would wait for it: there a signal is noted,
    and looked at where all of them agree what to do.

    Args:
        alone: whether this process is the whole run.

    Attributes:
        asked: the first signal that came; None before.
        twice: whether another followed.
        pause: called where a long piece of work could stop; with several processes by all of them alike.
    """

    def __init__(self, alone: bool = True) -> None:
        self.alone = alone
        self.asked: int | None = None
        self.twice = False
        self.pause: Callable[[], object] = lambda: None
        self._resting = False
        self._since = 0.0

    def __call__(self, number: int) -> None:
        """Take a signal: the handler for :func:`handled`."""
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = number, now
        elif self.alone or now - self._since > ECHO:
            self.twice = True
        if self.twice or (self._resting and self.alone):
            raise Interrupted(self.asked)

    def agreed(self, number: int) -> None:
        """All processes stop here: raise :class:`Interrupted`, also where the signal came to another one."""
        if self.asked is None:
            self._since = time.monotonic()
        self.asked = number
        raise Interrupted(number)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came."""
        if self.asked is not None and self.alone:
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
