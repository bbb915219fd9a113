"""The parts of the page in its order, each built on its own so that a fault costs one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtp_report import charts, headline, numbers
from vtp_report.components import components
from vtp_report.neighbours import neighbours
from vtp_report.page import Section, facts, flat, section, title
from vtp_report.reconstructions import reconstructions
from vtp_report.record import AbsentError, Record
from vtp_report.zero_shot import zero_shot

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


def sections(record: Record, *, samples: int, questions: int, depth: int, seed: int) -> dict[str, Any]:
    """What the template reads: words of the run and its sections by name."""
    name, date = title(record)
    return {
        "name": name,
        "date": date,
        "facts": facts(record),
        "faults": record.faults,
        "cards": section("headline", lambda: headline.cards(record.probes)),
        "losses": section("losses", lambda: charts.losses(record.metrics)),
        "schedules": section("schedules", lambda: charts.schedules(record.metrics)),
        "machine": section("throughput", lambda: charts.machine(record.metrics)),
        "probes": section("probe curves", lambda: charts.probe_curves(record.probes)),
        "tables": section("numbers", lambda: numbers.tables(record.probes)),
        "plan": _quoted(record.plan, "plan.txt"),
        "stack": _quoted(record.stack, "stack.yaml"),
        "environment": section("environment", lambda: _environment(record)),
        **_pictures(record, samples, questions, depth, seed),
    }


def _pictures(record: Record, samples: int, questions: int, depth: int, seed: int) -> dict[str, Section]:
    """Sections that need the trained tokenizer and the stack's data."""
    import torch

    opened = section("tokenizer", lambda: _opened(record))
    if opened.content is None:
        note = f"The tokenizer of this run could not be opened: {opened.note}"
        return dict.fromkeys(("reconstructions", "components", "neighbours", "zero_shot"), Section(note=note))
    tokenizer, bench = opened.content
    with torch.no_grad():
        return {
            "reconstructions": section(
                "reconstructions", lambda: reconstructions(tokenizer, bench, samples, seed)
            ),
            "components": section("components", lambda: components(tokenizer, bench, samples, seed)),
            "neighbours": section("neighbours", lambda: neighbours(bench, questions, depth, seed)),
            "zero_shot": section("zero-shot", lambda: zero_shot(tokenizer, bench, questions, depth, seed)),
        }


def _opened(record: Record) -> tuple[Any, Bench]:
    from vtp_core.evaluation import bench_of

    tokenizer, bench = bench_of(record.run)
    return tokenizer, bench


def _quoted(text: str, file: str) -> Section:
    return Section(text) if text.strip() else Section(note=f"{file} is missing or empty")


def _environment(record: Record) -> list[tuple[str, str]]:
    if not record.environment:
        raise AbsentError("environment.json is missing or empty")
    return flat(record.environment)
