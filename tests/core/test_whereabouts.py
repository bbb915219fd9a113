"""Where a thread is, as another one sees it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from pool import Pool

from vtp_core.whereabouts import look

HERE = Path(__file__).name


def seen(seconds: float) -> list[tuple[str, bool]]:
    """What another thread sees of this one for so long."""
    own, found = threading.get_ident(), list[tuple[str, bool]]()

    def looking() -> None:
        time.sleep(seconds)
        found.append(look(own))

    thread = threading.Thread(target=looking)
    thread.start()
    meet_or_sleep(2 * seconds)
    thread.join()
    return found


def meet_or_sleep(seconds: float) -> None:
    """The first of two processes waits for the other; a single one sleeps."""
    if not dist.is_initialized() or dist.get_rank() == 1:
        time.sleep(seconds)
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # one that no pulse counts, like FSDP2's


def test_the_line_is_that_of_the_one_who_called_into_python_itself() -> None:
    ((line, waits),) = seen(0.1)
    assert line.startswith(f"{HERE} line ") and line.endswith(" (meet_or_sleep)") and not waits
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert look(thread.ident or 0) == ("", False)
    done.set()
    thread.join()
    assert look(-1) == ("", False)


def test_who_waits_in_a_collective_is_told_from_who_does_not_come(two: Pool) -> None:
    ((first, waits),), ((second, comes_not),) = two(seen, 0.5)
    assert first.endswith(" (meet_or_sleep)") and second.endswith(" (meet_or_sleep)")
    assert (waits, comes_not) == (True, False)
