"""Curves as small SVG charts that take their colours from the page, so they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SLOTS = 7  # colours of the page; the eighth series takes the first again
POINTS = 240  # per curve; beyond, each stretch keeps its lowest and highest value
INK, LINE = "#010203", "#010204"  # stand-ins that become the page's own colours
SERIES = [f"#0102f{slot}" for slot in range(SLOTS)]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: values over steps, a colour slot, and how it is drawn."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    slot: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a legend."""

    name: str
    slot: int
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart; ``last`` is the latest value in words, ``legend`` says which line is which."""

    title: str
    last: str
    svg: Markup
    legend: list[Entry] = field(default_factory=list)


def draw(
    series: Sequence[Series],
    *,
    smooth: bool = False,
    raw: bool = True,
    marks: bool = False,
    logs: bool = True,
) -> Markup:
    """The chart of ``series`` as inline SVG; it holds numbers only, words stand in the page.

    Args:
        series: lines, drawn in order.
        smooth: draw the running mean over the values, which become faint.
        raw: with ``smooth``, draw the values themselves too.
        marks: put a dot at every value.
        logs: allow a logarithmic axis where positive values span more than a factor of thirty.
    """
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vtp", "path.simplify": True}):
        figure = Figure(figsize=(3.5, 1.75))
        axes = figure.subplots()
        drawn: list[float] = []
        logs = logs and all(value > 0 for line in series for value in line.values)
        for line in series:
            drawn += _draw_line(axes, line, smooth, raw, marks)
        _dress(axes, drawn, logs)
        figure.subplots_adjust(left=0.145, right=0.985, top=0.955, bottom=0.14)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return Markup(_adopted(out.getvalue()))  # matplotlib escapes, and there are only numbers


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred means over ``window`` values, over fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, count = window // 2, len(values)
    spans = ((max(0, at - half), min(count, at + half + 1)) for at in range(count))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in spans]


def tick(value: float) -> str:
    """A tick's value: short, so that it stays beside its axis."""
    return f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"


def _draw_line(axes: Axes, line: Series, smooth: bool, raw: bool, marks: bool) -> list[float]:
    """Draw one line; the values returned decide the limits of the axis."""
    finite = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if math.isfinite(v)]
    if not finite:
        return []
    steps, values = [s for s, _ in finite], [v for _, v in finite]
    colour = SERIES[line.slot % SLOTS]
    style = (0, (4, 2)) if line.dashed or line.slot >= SLOTS else "solid"
    shown = values
    if smooth and len(values) > 20:
        if raw:
            axes.plot(*_thinned(steps, values), color=colour, linewidth=0.6, alpha=0.35)
        shown = running_mean(values, max(5, len(values) // 30))
    marker = "o" if marks and not line.dashed else ""
    axes.plot(
        *_thinned(steps, shown), color=colour, linewidth=1.5, linestyle=style, marker=marker, markersize=2.6
    )
    return [*shown, *_quantiles(values, 0.01, 0.99)] if raw and len(values) > 20 else shown


def _quantiles(values: Sequence[float], *shares: float) -> list[float]:
    ranked = sorted(values)
    return [ranked[round(share * (len(ranked) - 1))] for share in shares]


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about POINTS points; every stretch keeps its extremes, in order."""
    stretch = max(1, math.ceil(2 * len(steps) / POINTS))
    if stretch < 3:
        return list(steps), list(values)
    kept: list[int] = []
    for start in range(0, len(steps), stretch):
        inside = range(start, min(start + stretch, len(steps)))
        kept += sorted({min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)})
    return [steps[at] for at in kept], [values[at] for at in kept]


def _dress(axes: Axes, drawn: Sequence[float], logs: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if drawn:
        low, high = min(drawn), max(drawn)
        if logs and high / low > 30:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 3.0)))
            axes.yaxis.minorticks_off()
            axes.set_ylim(low / 1.2, high * 1.2)
        else:
            span = high - low
            room = 0.06 * (span if span > 1e-6 * abs(high) else abs(high) or 1.0)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0, pad=3)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _adopted(svg: str) -> str:
    """The <svg> element alone, with the page's colours and font; no ids of groups, no needless digits."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r'(?<= )(?:d|x|y|transform)="[^"]*"', _shortened, svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    svg = svg.replace(INK, "var(--faint)").replace(LINE, "var(--rule)")
    for slot, stand_in in enumerate(SERIES):
        svg = svg.replace(stand_in, f"var(--s{slot})")
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)


def _shortened(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a point; words on the chart are no attributes and keep their digits."""
    return re.sub(r"(\d+\.\d)\d+", r"\1", attribute[0])
