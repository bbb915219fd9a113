"""Work that all processes of a run do alike: if one fails at it, or is asked to stop, all of them end there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vtp_core import distributed
from vtp_core.errors import Fault
from vtp_core.heartbeat import Heart
from vtp_core.peers import PULSE, PeerFault
from vtp_core.stopping import Stopping

T = TypeVar("T")


class Together:
    """The places where processes agree to go on; with one process work is simply done.

    Args:
        heart: of this process.
        stopping: told of signals.
        meant: the fault that an exception is; None for one that no process expects.

    Attributes:
        united: whether all processes end at one place, so that what needs all of them may still be done.
    """

    def __init__(
        self, heart: Heart, stopping: Stopping, meant: Callable[[BaseException], Fault | None]
    ) -> None:
        self.heart, self.stopping, self.meant = heart, stopping, meant
        self.alone = heart.world == 1
        self.united = self.alone
        stopping.pause = self.agree

    def begins(self, what: str, limited: bool = False, brief: bool = False) -> None:
        """Tell the others what this process does.

        Args:
            what: in words that follow "process 1 is".
            limited: whether ``train.timeout`` holds for it by itself, not only for those who wait for it.
            brief: whether it is cut short if it does not end soon after a signal; other work is finished first.
        """
        PULSE.now(what, limited, brief)

    def __call__(self, work: Callable[[], T], hear: bool = True) -> T:
        """What ``work`` returns, if it fails on no process; all of them call this in the same order.

        Args:
            work: what may fail.
            hear: whether this is a place to stop where a signal came.
        """
        if self.alone:
            return work()
        fault = None
        try:
            found = work()
        except PeerFault:
            raise
        except Exception as error:
            fault = self.meant(error)
            if fault is None or distributed.of_collective(error):
                raise
            if fault is not error:
                fault.__cause__ = error
        self.agree(fault, hear)
        return found

    def agree(self, fault: Fault | None = None, hear: bool = True) -> None:
        """All processes go on, or all of them end here for one reason."""
        if self.alone:
            return
        found = distributed.verdict(self.stopping.asked if hear else None, fault)
        if found is not None:
            self.united = self.heart.calm = True
            if isinstance(found, Fault):
                raise found
            self.stopping.agreed(found)
