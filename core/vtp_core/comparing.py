"""Numbers of several runs side by side; numbers that were measured differently are not compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vtp_core.errors import DataFault, StackFault, suggestion
from vtp_core.run.metrics import read

Key = tuple[str, str]
Rows = Mapping[Key, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The latest readings of several runs; printed as a table, with the protocols beneath.

    Attributes:
        runs: as they were named.
        trained_on: short fingerprint of each run's data; empty where the run tells none.
        rows: by (probe, split): of each run its row of ``probes.jsonl``, or None where it has none.
    """

    runs: tuple[str, ...]
    trained_on: tuple[str, ...]
    rows: Mapping[Key, tuple[Mapping[str, Any] | None, ...]]

    @property
    def data(self) -> list[dict[str, Any]]:
        """For JSON: a dict a probe and split, with ``values``, ``steps`` and ``n`` by run."""
        out = []
        for (probe, split), found in self.rows.items():
            pairs = [(run, row) for run, row in zip(self.runs, found, strict=True) if row is not None]
            columns = {
                name: {run: row.get(key) for run, row in pairs}
                for name, key in (("values", "value"), ("steps", "step"), ("n", "n"))
            }
            protocol = pairs[0][1].get("protocol", "")
            out.append({"probe": probe, "split": split, **columns, "protocol": protocol})
        return out

    def __str__(self) -> str:
        lines = [["probe", "split", *self.runs]]
        for (probe, split), found in self.rows.items():
            lines.append([probe, split, *("-" if row is None else _shown(row["value"]) for row in found)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        pad = [str.ljust, str.ljust, *([str.rjust] * len(self.runs))]
        table = ["  ".join(f(c, w) for f, c, w in zip(pad, line, widths, strict=True)) for line in lines]
        return "\n".join([*(line.rstrip() for line in table), "", *self._notes(), *self._protocols()])

    def _notes(self) -> list[str]:
        """Differences that a table hides: numbers of samples, steps, data."""
        notes = []
        for (probe, split), found in self.rows.items():
            counts = [row["n"] for row in found if row is not None and "n" in row]
            if len(set(counts)) > 1:
                notes.append(f"{probe} ({split}): of {', '.join(map(str, counts))} samples")
        last = [max((row.get("step", 0) for row in self._of(i)), default=0) for i in range(len(self.runs))]
        if len(set(last)) > 1:
            notes.append("steps: " + ", ".join(f"{run} {n}" for run, n in zip(self.runs, last, strict=True)))
        if len(set(self.trained_on)) > 1:
            pairs = zip(self.runs, self.trained_on, strict=True)
            notes.append("different data: " + ", ".join(f"{run} {data or 'unknown'}" for run, data in pairs))
        return [f"mind {note}" for note in notes] + ([""] if notes else [])

    def _of(self, run: int) -> list[Mapping[str, Any]]:
        return [row for found in self.rows.values() if (row := found[run]) is not None]

    def _protocols(self) -> list[str]:
        """A line a protocol, behind the probes that were measured by it."""
        probes: dict[str, dict[str, None]] = {}
        for row in self.data:
            probes.setdefault(row["protocol"], {})[row["probe"]] = None
        return [f"{', '.join(names)}: {protocol}" for protocol, names in probes.items()]


def compare(runs: Sequence[Path], only: Sequence[str] = ()) -> Comparison:
    """Latest readings of several runs, each probe by one protocol.

    Args:
        runs: run directories, or files of rows as ``probes.jsonl`` has them.
        only: names of probes, whole, their first part, or a pattern (``generation/*``); without them all.

    Raises:
        DataFault: a run has no probes.
        StackFault: two protocols of a probe differ, no probe is named so, or a run is named twice.
    """
    if len(set(runs)) < len(runs) or not runs:
        raise StackFault("compare takes different runs, one at least")
    found = [_latest(run) for run in runs]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    chosen = [key for key in keys if not only or any(_named(key[0], name) for name in only)]
    for name in only:
        if not any(_named(probe, name) for probe, _ in keys):
            raise StackFault(
                f"--only {name}: no run has such a probe{suggestion(name, {k[0] for k in keys})}"
            )
    names = [str(run) for run in runs]
    rows = {key: tuple(rows.get(key) for rows in found) for key in chosen}
    _check_protocols(names, rows)
    return Comparison(tuple(names), tuple(_data(run) for run in runs), rows)


def _latest(run: Path) -> Rows:
    """The last reading of every (probe, split)."""
    path = run / "probes.jsonl" if run.is_dir() else run
    if not path.is_file():
        inside = sorted({str(p.parent) for p in run.glob("*/**/probes.jsonl")}) if run.is_dir() else []
        hint = f"; its stages have some: {', '.join(inside[:6])}" if inside else ""
        raise DataFault(f"{run} has no probes.jsonl{hint}")
    rows = sorted(read(path), key=lambda row: int(row.get("step", 0)))
    try:
        return {(str(row["probe"]), str(row["split"])): row for row in rows if "value" in row}
    except KeyError as error:
        raise DataFault(f"{path}: a row has no {error}") from error


def _data(run: Path) -> str:
    """The start of the fingerprint that ``environment.json`` keeps."""
    try:
        return str(json.loads((run / "environment.json").read_text(encoding="utf-8"))["data"])[:12]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _named(probe: str, name: str) -> bool:
    return probe == name or probe.startswith(f"{name}/") or fnmatchcase(probe, name)


def _check_protocols(runs: Sequence[str], rows: Mapping[Key, Sequence[Mapping[str, Any] | None]]) -> None:
    differing = {key: said for key, found in rows.items() if len(said := _said(runs, found)) > 1}
    if not differing:
        return
    (probe, split), said = next(iter(differing.items()))
    (one, first), (two, second), *_ = said.items()
    more = dict.fromkeys(name for name, _ in differing if name != probe)
    alike = dict.fromkeys(key[0] for key in rows if key[0] not in {name for name, _ in differing})
    also = f" (as were {', '.join(more)})" if more else ""
    hint = f"leave it out with --only {' --only '.join(alike)}" if alike else "no probe was measured alike"
    raise StackFault(
        f"{probe} (split {split}){also} was measured by different protocols; its numbers don't compare:\n"
        f"  {first}: {one}\n  {second}: {two}\nmeasure alike with vtp eval; {hint}"
    )


def _said(runs: Sequence[str], found: Sequence[Mapping[str, Any] | None]) -> dict[str, str]:
    """Every protocol of a probe, with the first run that names it."""
    said: dict[str, str] = {}
    for run, row in zip(runs, found, strict=True):
        if row is not None:
            said.setdefault(str(row.get("protocol") or "protocol not recorded"), run)
    return said


def _shown(value: float) -> str:
    return f"{float(value):.4g}" if abs(float(value)) < 1e4 else f"{float(value):,.0f}"
