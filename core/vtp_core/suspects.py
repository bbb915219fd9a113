"""Who died or hangs, from two looks at everybody's signs of life."""

from __future__ import annotations

from collections.abc import Mapping

from vtp_core.peers import Beat

Beats = Mapping[int, Beat | None]
"""The last sign of life by rank; None of a process that never gave one."""

_GONE = "is dead or stopped; it was last seen"


def dead(rank: int, first: Beats, second: Beats) -> list[int]:
    """Processes but ``rank`` that gave no sign of life between two looks, though they have not left."""
    return [other for other in second if other != rank and _silent(first[other], second[other])]


def hanging(beats: Beats) -> dict[int, Beat]:
    """Those that the others wait for: of the ones that have entered the fewest collectives, who is not inside one.

    FSDP2's collectives are not counted, so whoever waits in one has entered no more than who never comes.
    """
    alive = {rank: beat for rank, beat in beats.items() if beat is not None and not beat.left}
    least = min((beat.collectives for beat in alive.values()), default=0)
    late = {rank: beat for rank, beat in alive.items() if beat.collectives == least}
    busy = {rank: beat for rank, beat in late.items() if not beat.waits}
    return busy or late


def named(rank: int, first: Beats, second: Beats) -> str:
    """Who died or hangs and what it was doing, as ``rank`` finds it."""
    own = second[rank]
    if gone := dead(rank, first, second):
        lines = [_told(other, second[other], _GONE) for other in gone]
        return "; ".join([*lines, f"process {rank} is {own.doing}"] if own else lines)
    late = hanging(second)
    if len(late) == sum(beat is not None and not beat.left for beat in second.values()):
        lines = [_told(other, beat, "is") for other, beat in late.items()]
        return "the processes wait for one another, though all are alive: " + "; ".join(lines)
    return "; ".join(_told(r, beat, "hangs and the others wait for it; it is") for r, beat in late.items())


def _silent(first: Beat | None, second: Beat | None) -> bool:
    return second is None or (first is not None and first.number == second.number and not second.left)


def _told(rank: int, beat: Beat | None, state: str) -> str:
    """A process, its host, what befell it, and what it was doing at its last sign of life."""
    if beat is None:
        return f"process {rank} has never given a sign of life"
    where = f", in {beat.where}" if beat.where else ""
    idle = "" if state == _GONE else f" for {beat.idle:.0f} s"
    return f"process {rank} ({beat.host}) {state} {beat.doing}{idle}{where}"
