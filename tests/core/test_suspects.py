"""Who is suspected, from signs of life."""

from __future__ import annotations

from dataclasses import replace

from vtp_core import suspects
from vtp_core.peers import Beat

SLEEPS = Beat(7, "in step 6", 20, 8.0, "here", where="mishaps.py line 23 (_sleep)")
WAITS = Beat(7, "in step 6", 20, 8.0, "there", where="vit.py line 9 (Block.forward)", waits=True)


def later(beat: Beat) -> Beat:
    return replace(beat, number=beat.number + 3)


def test_who_has_entered_fewer_collectives_hangs() -> None:
    ahead = replace(SLEEPS, collectives=21)
    assert suspects.hanging({0: ahead, 1: SLEEPS, 2: ahead}) == {1: SLEEPS}


def test_of_equal_counts_who_is_in_no_collective_hangs() -> None:
    assert suspects.hanging({0: WAITS, 1: SLEEPS, 2: WAITS}) == {1: SLEEPS}
    found = suspects.named(0, {0: WAITS, 1: SLEEPS}, {0: later(WAITS), 1: later(SLEEPS)})
    expected = (
        "process 1 (here) hangs and the others wait for it; it is in step 6 for 8 s, in mishaps.py line 23"
    )
    assert found == f"{expected} (_sleep)"


def test_where_nobody_stands_out_every_process_is_printed() -> None:
    for first in (WAITS, SLEEPS):
        second = replace(first, host="elsewhere")
        found = suspects.named(0, {0: first, 1: second}, {0: later(first), 1: later(second)})
        assert found.startswith("the processes wait for one another, though all are alive: process 0 (")
        assert f"; process 1 (elsewhere) is in step 6 for 8 s, in {first.where}" in found


def test_who_gives_no_sign_of_life_is_dead_unless_it_has_left() -> None:
    gone, left = SLEEPS, replace(SLEEPS, left=True)
    first, second = {0: WAITS, 1: gone, 2: left, 3: None}, {0: later(WAITS), 1: gone, 2: left, 3: None}
    assert suspects.dead(0, first, second) == [1, 3]
    found = suspects.named(0, first, second)
    told = "process 1 (here) is dead or stopped; it was last seen in step 6, in mishaps.py line 23 (_sleep); "
    assert found == f"{told}process 3 has never given a sign of life; process 0 is in step 6"
