"""The parts of the page in its order, each built on its own so that a fault costs one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vtp_report import charts, generated, headline, numbers, strips
from vtp_report.amounts import Amounts
from vtp_report.asked import asked
from vtp_report.before import before
from vtp_report.components import components
from vtp_report.draws import Draws, opened
from vtp_report.neighbours import neighbours
from vtp_report.page import Section, facts, flat, section, title
from vtp_report.reconstructions import reconstructions
from vtp_report.record import AbsentError, Record
from vtp_report.zero_shot import zero_shot

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


def sections(record: Record, amounts: Amounts) -> dict[str, Any]:
    """What the template reads: words of the run and its sections by name."""
    name, date = title(record)
    return {
        "stage": record.stage,
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
        **_pictures(record, amounts),
    }


def _pictures(record: Record, amounts: Amounts) -> dict[str, Section]:
    """Sections that need the trained modules and the stack's data."""
    import torch

    found = section("tokenizer", lambda: _opened(record))
    with torch.no_grad():
        parts = _of_tokenizer(found, record, amounts)
        if record.stage.generator:
            bench = found.content[1] if found.content else None
            parts |= _of_generator(record, bench, amounts)
    return parts


def _of_tokenizer(found: Section, record: Record, amounts: Amounts) -> dict[str, Section]:
    """Neighbours and zero-shot tell of encoders that were trained for them: a generator's run leaves them out."""
    names = ["reconstructions", "components"]
    names += [] if record.stage.generator else ["neighbours", "zero_shot"]
    names += ["before"] if record.stage.retrained else []
    if found.content is None:
        note = f"The tokenizer of this run could not be opened: {found.note}"
        return dict.fromkeys(names, Section(note=note))
    tokenizer, bench = found.content
    n, seed = amounts.samples, amounts.seed
    makers: dict[str, Callable[[], Any]] = {
        "reconstructions": lambda: reconstructions(tokenizer, bench, n, seed),
        "components": lambda: components(tokenizer, bench, n, seed),
        "neighbours": lambda: neighbours(bench, amounts.questions, amounts.depth, seed),
        "zero_shot": lambda: zero_shot(tokenizer, bench, amounts.questions, amounts.depth, seed),
        "before": lambda: before(record, tokenizer, bench, (n + 1) // 2, seed),
    }
    return {name: section(name.replace("_", "-"), makers[name]) for name in names}


def _of_generator(record: Record, bench: Bench | None, amounts: Amounts) -> dict[str, Section]:
    """Samples and strips; without images of the data, samples alone."""
    found = section("generator", lambda: _draws(record, bench, amounts))
    if found.content is None:
        note = Section(note=f"Nothing could be sampled: {found.note}")
        return dict.fromkeys(("generated", "noises", "conditions"), note)
    draws = found.content
    return {
        "generated": section("samples", lambda: generated.grid(draws)),
        "noises": section("interpolation of noise", lambda: strips.noises(draws, amounts.frames)),
        "conditions": section("interpolation of labels", lambda: strips.conditions(draws, amounts.frames)),
    }


def _draws(record: Record, bench: Bench | None, amounts: Amounts) -> Draws:
    plain, guided = opened(record)
    conditions = asked(plain, bench, amounts.labels)
    return Draws(plain, guided, conditions, amounts.draws, amounts.seed)


def _opened(record: Record) -> tuple[Any, Bench]:
    from vtp_core.evaluation import bench_of

    tokenizer, bench = bench_of(record.run, record.registry)
    return tokenizer, bench


def _quoted(text: str, file: str) -> Section:
    return Section(text) if text.strip() else Section(note=f"{file} is missing or empty")


def _environment(record: Record) -> list[tuple[str, str]]:
    if not record.environment:
        raise AbsentError("environment.json is missing or empty")
    return flat(record.environment)
