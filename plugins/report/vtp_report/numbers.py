"""The numbers of a run: each with its protocol, the latest of every probe and split."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vtp_report.record import AbsentError, Row

# Words by which a probe's name says what it measures: a yardstick, or a feature of the tokenizer.
YARDSTICK = re.compile(r"(?:^|(?<=[/_@]))(pixels\d*|chance|floor)(?=$|[/_@])")
# What the probe `generation` sets beside a distance of samples.
BESIDE = re.compile(r"(?P<of>generation/[^/]+)/(?P<word>floor|reconstructions|noise)")
FEATURES = ("cls", "patches", "latent")


@dataclass(frozen=True, slots=True)
class Cell:
    """A value in words, the samples behind it, and its step where that is not the probe's last."""

    value: str
    n: str
    step: str


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: one metric, a cell per split (None where it was not measured), its protocols."""

    metric: str
    cells: list[Cell | None]
    protocols: list[str]
    yardstick: bool


@dataclass(frozen=True, slots=True)
class Table:
    """All readings of one probe; ``protocols`` are those that all its lines share."""

    probe: str
    splits: list[str]
    lines: list[Line]
    protocols: list[str]


def is_yardstick(probe: str) -> bool:
    """Whether a probe's name says that it measures pixels, chance or a floor, and not the tokenizer."""
    return bool(YARDSTICK.search(probe) or BESIDE.fullmatch(probe))


def yardstick_word(probe: str) -> str:
    """The word by which a yardstick's name says what it is."""
    beside = BESIDE.fullmatch(probe)
    return beside["word"] if beside else str(YARDSTICK.findall(probe)[0])


def yardstick_of(probe: str, probes: Iterable[str]) -> str:
    """The yardstick with ``probe``'s own name but for the words of feature and yardstick; else empty."""
    return next(iter(yardsticks_of(probe, probes)), "")


def yardsticks_of(probe: str, probes: Iterable[str]) -> list[str]:
    """All yardsticks of a probe, in the order of ``probes``."""
    own = family(probe)
    return [other for other in dict.fromkeys(probes) if is_yardstick(other) and family(other) == own]


def family(probe: str) -> str:
    """A probe's name without the words of feature and yardstick: ``knn/concept@train``."""
    beside = BESIDE.fullmatch(probe)
    if beside:
        return beside["of"]
    words = re.split(r"(?=[/@])", YARDSTICK.sub("", probe))
    return "".join(word for word in words if word.strip("/_") and word.strip("/") not in FEATURES)


def feature(probe: str) -> str:
    """The feature that a probe's name says it reads; else empty."""
    return next((word for word in probe.split("/") if word in FEATURES), "")


def spoken(value: float) -> str:
    """A number to read: four digits at most, none invented."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def tables(rows: Sequence[Row]) -> list[Table]:
    """The latest reading of every probe and split, grouped by probe.

    Raises:
        AbsentError: no probe ran.
    """
    if not rows:
        raise AbsentError("probes.jsonl is missing or empty")
    found = latest(rows)
    groups = dict.fromkeys(probe.partition("/")[0] for probe, _ in found)
    return [_table(group, found) for group in groups]


def latest(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """The last reading of every (probe, split)."""
    return {
        (str(row["probe"]), str(row["split"])): row for row in sorted(rows, key=lambda row: int(row["step"]))
    }


def _table(group: str, found: dict[tuple[str, str], Row]) -> Table:
    inside = {key: row for key, row in found.items() if key[0].partition("/")[0] == group}
    splits = list(dict.fromkeys(split for _, split in inside))
    final = max(int(row["step"]) for row in inside.values())
    lines = []
    for probe in dict.fromkeys(probe for probe, _ in inside):
        readings = [inside.get((probe, split)) for split in splits]
        protocols = list(dict.fromkeys(protocol(row) for row in readings if row))
        cells = [_cell(row, final) if row else None for row in readings]
        lines.append(Line(probe.partition("/")[2] or probe, cells, protocols, is_yardstick(probe)))
    shared = lines[0].protocols if all(line.protocols == lines[0].protocols for line in lines) else []
    return Table(group, splits, lines, shared)


def _cell(row: Row, final: int) -> Cell:
    n = row.get("n")
    return Cell(
        value=spoken(float(row["value"])),
        n=f"{n:,}" if isinstance(n, int) else "?",
        step=f"step {row['step']}" if row["step"] != final else "",
    )


def protocol(row: Row) -> str:
    """How a reading was measured, in its own words."""
    return str(row.get("protocol") or "protocol not recorded")
