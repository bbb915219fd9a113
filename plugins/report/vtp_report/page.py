"""Sections to one HTML file: everything quoted is escaped, nothing is fetched, nothing runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vtp_core.run.environment import masked
from vtp_report.record import AbsentError, Record

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its content, or the line that stands in its place."""

    content: Any = None
    note: str = ""


def section(name: str, build: Callable[[], Any]) -> Section:
    """What ``build`` makes; a fault costs the page one section and is told there and in the log."""
    try:
        return Section(build())
    except AbsentError as absent:
        return Section(note=str(absent))
    except Exception as fault:
        LOG.warning("report: %s left out: %s: %s", name, type(fault).__name__, fault)
        return Section(note=f"{type(fault).__name__}: {fault}")


def title(record: Record) -> tuple[str, str]:
    """Name and start of the run: run.json's, else the directory's name."""
    started = str(record.about.get("started", "")).replace("T", " ")
    return str(record.about.get("name") or record.run.name), started[:16]


def facts(record: Record) -> list[tuple[str, str]]:
    """The line under the title: steps, time, machine, and the status of a run that did not end well."""
    seconds = sum(float(row.get("time/step") or 0) for row in record.metrics)
    status = str(record.about.get("status", ""))
    found = [
        ("steps", f"{record.steps:,}" if record.steps else ""),
        ("trained for", spoken_time(seconds) if seconds else ""),
        ("on", machine(record.environment)),
        ("tokenizer from", str(masked(record.stage.source))),
        ("status", status if status in {"failed", "preempted"} else ""),
    ]
    return [(label, value) for label, value in found if value]


def machine(environment: dict[str, Any]) -> str:
    """The accelerators, else the processor cores, as environment.json names them."""
    torch, platform = environment.get("torch"), environment.get("platform")
    devices = torch.get("devices") if isinstance(torch, dict) else None
    if devices:
        return ", ".join(f"{devices.count(name)} × {name}" for name in dict.fromkeys(map(str, devices)))
    if not isinstance(platform, dict):
        return ""
    cores = f"{platform['cpus']} CPU cores" if platform.get("cpus") else "CPU"
    return " · ".join(str(part) for part in (cores, platform.get("machine"), platform.get("system")) if part)


def spoken_time(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys and values in words."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def render(**parts: Any) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vtp_report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(**parts)
