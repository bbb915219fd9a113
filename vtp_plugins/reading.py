"""One measured number with the protocol it was measured by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reading:
    """A row of ``probes.jsonl``.

    Attributes:
        probe: what was measured, ``reconstruction/psnr``.
        split: name of the dataset's split.
        value: the number.
        n: samples behind it.
        protocol: data, resolution, feature network, seed and the like, in one line.
    """

    probe: str
    split: str
    value: float
    n: int
    protocol: str
