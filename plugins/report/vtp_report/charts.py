"""From rows of metrics and probes to charts, grouped as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vtp_report.curves import SLOTS, Chart, Entry, Series, draw, running_mean
from vtp_report.headline import headline_keys
from vtp_report.numbers import family, feature, is_yardstick, spoken, yardstick_word, yardsticks_of
from vtp_report.record import AbsentError, Row

NOT_LOSSES = ("weight/", "lr/", "grad/", "time/")
MACHINE = {
    "images_per_second": "images per second",
    "time/step": "time per step, s",
    "time/data": "data wait, s",
}
SHARED = {"weight/": "weights", "lr/": "learning rates", "grad/": "gradient norms"}

Column = list[tuple[float, float]]  # step and value
Lines = Mapping[str, Mapping[str, Column]]  # probe, split


def losses(rows: Sequence[Row]) -> list[Chart]:
    """The total and every term, one chart each; terms of one objective share a colour.

    Raises:
        AbsentError: metrics.jsonl is missing or empty.
    """
    columns = _columns(rows)
    if not columns:
        raise AbsentError("metrics.jsonl is missing or empty")
    terms = [key for key in columns if "/" in key and not key.startswith(NOT_LOSSES)]
    slots = _slots(rows)
    charts = [_single("loss", columns["loss"], slot=0)] if "loss" in columns else []
    return charts + [_single(key, columns[key], slot=slots[key.partition("/")[0]]) for key in terms]


def schedules(rows: Sequence[Row]) -> list[Chart]:
    """Weights, learning rates and gradient norms, the members of each in one chart."""
    columns, slots = _columns(rows), _slots(rows)
    charts = []
    for prefix, title in SHARED.items():
        names = [key.removeprefix(prefix) for key in columns if key.startswith(prefix)]
        lines = {name: columns[prefix + name] for name in names}
        order = {name: slots.get(name, len(slots) + 1 + at) for at, name in enumerate(names)}
        if lines:
            charts.append(_shared(title, lines, order, smooth=prefix == "grad/"))
    return charts


def machine(rows: Sequence[Row]) -> list[Chart]:
    """Throughput and where the time of a step goes."""
    columns = _columns(rows)
    return [_single(title, columns[key], slot=5) for key, title in MACHINE.items() if key in columns]


@dataclass(frozen=True, slots=True)
class ProbeCurves:
    """Charts of probes over training: those of the headlines, and the others."""

    main: list[Chart]
    others: list[Chart]


def probe_curves(rows: Sequence[Row]) -> ProbeCurves:
    """One chart per probe with a line per split, or per probe and split with a line per feature.

    Raises:
        AbsentError: no probe ran more than once.
    """
    lines: dict[str, dict[str, Column]] = {}
    for row in sorted(rows, key=lambda row: int(row["step"])):
        points = lines.setdefault(str(row["probe"]), {}).setdefault(str(row["split"]), [])
        points.append((float(row["step"]), float(row["value"])))
    curves = ProbeCurves([], [])
    headlines = set(headline_keys(rows))
    for members in _families(lines).values():
        for split, chart in _family_charts(members, lines):
            first = any((probe, split or s) in headlines for probe in members for s in lines[probe])
            (curves.main if first else curves.others).append(chart)
    if not curves.main and not curves.others:
        raise AbsentError("no probe ran more than once")
    return curves


def _columns(rows: Iterable[Row]) -> dict[str, Column]:
    """(step, value) pairs of every numeric key, keys in the order they first appear."""
    columns: dict[str, Column] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                columns.setdefault(key, []).append((float(row["step"]), float(value)))
    return columns


def _slots(rows: Iterable[Row]) -> dict[str, int]:
    """A colour for every objective, 1 and up; 0 is the total."""
    names = [key.partition("/")[0] for key in _columns(rows) if "/" in key and not key.startswith(NOT_LOSSES)]
    return {name: slot for slot, name in enumerate(dict.fromkeys(names), start=1)}


def _single(title: str, points: Column, slot: int) -> Chart:
    series = _series(title, points, slot)
    finite = [value for value in series.values if math.isfinite(value)]
    last = running_mean(finite, max(5, len(finite) // 30))[-1] if finite else math.nan
    return Chart(title, spoken(last), draw([series], smooth=True))


def _shared(title: str, lines: Mapping[str, Column], slots: Mapping[str, int], smooth: bool) -> Chart:
    series = [_series(name, points, slots[name]) for name, points in lines.items()]
    if len(series) > 1 and not smooth and all(line.values == series[0].values for line in series):
        series = [_series("all", next(iter(lines.values())), slot=0)]  # equal schedules are one line
    legend = [Entry(line.name, line.slot, line.slot >= SLOTS) for line in series]
    return Chart(title, "", draw(series, smooth=smooth, raw=False, logs=smooth), legend)


def _families(probes: Iterable[str]) -> dict[str, list[str]]:
    """Probes that differ in feature or are a yardstick of each other, by what they share."""
    families: dict[str, list[str]] = {}
    for probe in probes:
        families.setdefault(family(probe), []).append(probe)
    return families


def _family_charts(members: list[str], lines: Lines) -> Iterator[tuple[str, Chart]]:
    """Charts of probes that ran more than once, with the split they are about; empty for all splits."""
    measured = [probe for probe in members if not is_yardstick(probe)]
    if not any(feature(probe) for probe in measured):
        for probe in measured:
            if max(map(len, lines[probe].values())) > 1:
                yield "", _by_split(probe, lines)
        return
    for split in dict.fromkeys(split for probe in measured for split in lines[probe]):
        inside = [probe for probe in members if split in lines[probe]]
        if max(len(lines[probe][split]) for probe in inside) > 1:
            yield split, _by_feature(inside, split, lines)


def _by_feature(members: list[str], split: str, lines: Lines) -> Chart:
    """Features as lines, the yardstick dashed."""
    series = []
    for slot, probe in enumerate(members, start=1):
        yardstick = is_yardstick(probe)
        name = yardstick_word(probe) if yardstick else feature(probe)
        series.append(_series(name, lines[probe][split], 0 if yardstick else slot, yardstick))
    return _marked(family(members[0]), split, series)


def _by_split(probe: str, lines: Lines) -> Chart:
    """Splits as lines; the yardstick of the same split dashed, in its colour, any further ones in others.

    Decoded noise is left to the card: so far above the rest, it would press every other line flat.
    """
    slots = {split: slot for slot, split in enumerate(lines[probe], start=1)}
    series = [_series(split, points, slots[split]) for split, points in lines[probe].items()]
    yardsticks = [name for name in yardsticks_of(probe, lines) if yardstick_word(name) != "noise"]
    for place, yardstick in enumerate(yardsticks):
        for split, points in lines[yardstick].items():
            slot = slots.get(split, 0) + place * len(slots)
            series.append(_series(f"{yardstick_word(yardstick)}, {split}", points, slot, True))
    return _marked(probe, "", series)


def _series(name: str, points: Column, slot: int, dashed: bool = False) -> Series:
    return Series(name, [step for step, _ in points], [value for _, value in points], slot, dashed)


def _marked(title: str, last: str, series: list[Series]) -> Chart:
    legend = [Entry(line.name, line.slot, line.dashed) for line in series]
    return Chart(title, last, draw(series, marks=True, logs=False), legend)
