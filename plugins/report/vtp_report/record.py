"""What a run directory says about itself, read without building a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtp_core.errors import DataFault, StackFault
from vtp_core.run import metrics
from vtp_core.run.environment import masked
from vtp_plugins.registry import Registry
from vtp_report.stage import Stage, stage_of

Row = dict[str, Any]


class AbsentError(Exception):
    """A section has nothing to show; the message is the line that stands in its place."""


@dataclass(frozen=True, slots=True)
class Record:
    """The files of a run that are text.

    Attributes:
        run: the run directory.
        metrics: rows of metrics.jsonl.
        probes: rows of probes.jsonl, each a reading with its ``step``.
        stack: the resolved stack, YAML; empty where the file is missing.
        plan: the printed plan; empty where the file is missing.
        about: run.json: name, start, status; empty where the file is missing.
        environment: environment.json; empty where the file is missing.
        faults: files that are there and cannot be read, one line each.
        stage: what the stack trains, and from what.
        registry: what the names of the stack mean.
    """

    run: Path
    metrics: list[Row]
    probes: list[Row]
    stack: str
    plan: str
    about: dict[str, Any]
    environment: dict[str, Any]
    faults: tuple[str, ...] = ()
    stage: Stage = field(default_factory=Stage)
    registry: Registry = field(default_factory=Registry)

    @property
    def steps(self) -> int:
        """Steps taken: the last step that either file names."""
        return max((int(row["step"]) for row in [*self.metrics, *self.probes]), default=0)


def read(run: Path, registry: Registry) -> Record:
    """The record of ``run``; a file that is missing leaves its place empty."""
    faults: list[str] = []
    rows = _rows(run / "metrics.jsonl", faults)
    probes = _rows(run / "probes.jsonl", faults)
    return Record(
        run=run,
        metrics=rows,
        probes=[row for row in probes if {"probe", "split", "value"} <= row.keys()],
        stack=masked(_text(run / "stack.yaml")),
        plan=masked(_text(run / "plan.txt")),
        about=_mapping(run / "run.json", faults),
        environment=masked(_mapping(run / "environment.json", faults)),
        faults=tuple(faults),
        stage=_stage(run / "stack.yaml"),
        registry=registry,
    )


def _stage(path: Path) -> Stage:
    """The stage of a stack's file; one that cannot be read is shown as it is, as a tokenizer's."""
    from vtp_core.overrides import merged
    from vtp_core.overrides import read as read_stack

    try:
        return stage_of(merged(read_stack(path), ()))
    except StackFault:
        return Stage()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _rows(path: Path, faults: list[str]) -> list[Row]:
    """Rows with an integer ``step``."""
    if not path.is_file():
        return []
    try:
        return [row for row in metrics.read(path) if isinstance(row.get("step"), int)]
    except DataFault as fault:
        faults.append(str(fault))
        return []


def _mapping(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError as error:
        faults.append(f"{path}: {error}")
        return {}
    return value if isinstance(value, dict) else {}
