"""What the processes of one run tell each other: what each is doing, and which of them failed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from vtp_core.errors import Fault


class PeerFault(Fault):
    """Another process of the run failed, died or hangs, and this one ends with it.

    Args:
        message: names that process and what befell it.
        code: exit code of its fault; 75 of one that died or hangs, as the run can be resumed.
        known: whether another process says the same.
    """

    def __init__(self, message: str, code: int, known: bool = False) -> None:
        super().__init__(message)
        self.code, self.known = code, known


class Pulse:
    """What this process is doing; written where work begins, read by its heartbeat.

    Attributes:
        doing: in words that follow "process 1 is".
        collectives: entered so far; a process that hangs has entered fewer than those that wait for it.
        limited: whether ``train.timeout`` limits this: others wait, or this process waits for them.
        brief: whether this is cut short if it does not end soon after a signal; a save or a measurement is not.
        since: when any of it changed, on the monotonic clock.
        longest: seconds that a step has computed between two collectives, so far.
    """

    def __init__(self) -> None:
        self.doing, self.collectives = "starting", 0
        self.limited = self.brief = False
        self.since, self.longest = time.monotonic(), 0.0

    def now(self, doing: str, limited: bool = False, brief: bool = False) -> None:
        """Something else begins."""
        self._beat(self.limited)
        self.doing, self.limited, self.brief = doing, limited, brief

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """A call that returns once all processes have made it."""
        before = self.limited
        self._beat(before)
        self.limited = True
        self.collectives += 1
        try:
            yield
        finally:
            self.limited = before
            self._beat(False)

    def _beat(self, computed: bool) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.since) if computed else self.longest
        self.since = now


PULSE = Pulse()
"""Of this process; it does nothing by itself."""


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        idle: how long the process has been doing what it says, in seconds.
        brief: whether that is cut short if it does not end soon after a signal.
        where: the line of code it is at.
        waits: whether it is inside a collective, or comes from one that failed.
        left: whether it has gone in order.
        told: whether it knows why the run ends.
    """

    number: int
    doing: str
    collectives: int
    idle: float
    host: str
    brief: bool = False
    where: str = ""
    waits: bool = False
    left: bool = False
    told: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: the first one posted holds for all.

    Attributes:
        rank: of the process that posted it.
        text: what befell it, or what it found out about others.
        code: exit code of every process.
        own: whether it speaks of itself.
    """

    rank: int
    text: str
    code: int
    own: bool

    def for_peer(self, rank: int) -> PeerFault:
        """The same to process ``rank``."""
        text = f"process {self.rank} failed: {self.text}" if self.own else self.text
        return PeerFault(text, self.code, known=self.rank != rank)
