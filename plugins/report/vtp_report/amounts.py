"""How much a page shows."""

from __future__ import annotations

from dataclasses import dataclass

from vtp_report.asked import Wanted


@dataclass(frozen=True, slots=True)
class Amounts:
    """The options of :class:`vtp_report.Report`, where they are told."""

    samples: int = 8
    questions: int = 8
    depth: int = 5
    seed: int = 0
    labels: Wanted = 6
    draws: int = 2
    frames: int = 7
