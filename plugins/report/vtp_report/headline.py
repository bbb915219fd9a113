"""The handful of numbers up front, each beside its yardstick, so that nobody is fooled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtp_report.numbers import latest, protocol, spoken, yardstick_word, yardsticks_of
from vtp_report.record import Row


@dataclass(frozen=True, slots=True)
class Headline:
    """A number up front.

    Attributes:
        label: what people call it; ``{kind}`` is what the data's labels are.
        pattern: the probe's whole name, a regular expression.
        unit: ``%`` for shares, ``dB``, or nothing.
    """

    label: str
    pattern: str
    unit: str = ""


HEADLINES = (
    Headline("reconstruction, PSNR", r"reconstruction/psnr", "dB"),
    Headline("a caption finds its image, top-1", r"zero_shot/text_to_image_top1", "%"),
    Headline("nearest neighbour is the same concept", r"knn/cls/concept@.+", "%"),
    Headline("nearest neighbour is of the same {kind}", r"knn/cls/label@.+", "%"),
    Headline("reconstructions, FD-lite0", r"fd_lite0"),
    Headline("samples, FD-lite0", r"generation/fd_lite0"),
    Headline("samples, FID", r"generation/fid"),
    Headline("samples near real images, precision", r"generation/precision(_\w+)?", "%"),
    Headline("real images near samples, recall", r"generation/recall(_\w+)?", "%"),
)
WORDS = {"reconstructions": "the tokenizer's reconstructions", "noise": "decoded noise"}


@dataclass(frozen=True, slots=True)
class Card:
    """A headline with its values.

    Attributes:
        label: what it is.
        value: in words.
        beside: the yardstick, or the other splits, in words.
        fill: the value as a share of a bar; None for no bar.
        mark: the yardstick on that bar.
        note: split, samples and protocol.
    """

    label: str
    value: str
    beside: list[str]
    fill: float | None
    mark: float | None
    note: str


Found = Mapping[tuple[str, str], Row]


def cards(rows: Sequence[Row]) -> list[Card]:
    """The headlines that this run measured, in their order."""
    found = latest(rows)
    kind = "sub-category" if any("/concept@" in probe for probe, _ in found) else "class"
    keys = {headline: _key(headline, found) for headline in HEADLINES}
    return [_card(headline, key, found, kind) for headline, key in keys.items() if key]


def headline_keys(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Probe and split of the readings up front."""
    found = latest(rows)
    return [key for headline in HEADLINES if (key := _key(headline, found))]


def _key(headline: Headline, found: Found) -> tuple[str, str] | None:
    return next((key for key in found if re.fullmatch(headline.pattern, key[0])), None)


def _card(headline: Headline, key: tuple[str, str], found: Found, kind: str) -> Card:
    probe, split = key
    row = found[probe, split]
    value = float(row["value"])
    mark, beside = _yardstick(probe, split, value, headline.unit, found)
    if not beside:
        others = [(s, float(row["value"])) for (p, s), row in found.items() if p == probe and s != split]
        beside = [f"{worded(other, headline.unit)} on {s}" for s, other in others]
    share = headline.unit == "%"
    n = row.get("n")
    return Card(
        label=headline.label.format(kind=kind),
        value=worded(value, headline.unit),
        beside=beside,
        fill=value if share else None,
        mark=mark if share else None,
        note=f"{split}{f', n = {n:,}' if isinstance(n, int) else ''}: {protocol(row)}",
    )


def _yardstick(
    probe: str, split: str, value: float, unit: str, found: Found
) -> tuple[float | None, list[str]]:
    """The yardstick's value, and words of all of them: readings, or the chance that the protocol states."""
    names = yardsticks_of(probe, [p for p, s in found if s == split])
    if names:
        base = float(found[names[0], split]["value"])
        word = yardstick_word(names[0])
        if word.startswith("pixels"):
            side = word.removeprefix("pixels")
            verdict = "above" if value > base else "below"
            return base, [f"{verdict} {f'{side}×{side} ' if side else ''}pixels: {worded(base, unit)}"]
        return base, [_beside(name, float(found[name, split]["value"]), unit) for name in names]
    chance = re.search(r"chance[^|%]*?([\d.]+) %", protocol(found[probe, split]))
    if chance:
        return float(chance[1]) / 100, [f"chance {chance[1]} %"]
    return None, []


def _beside(yardstick: str, value: float, unit: str) -> str:
    word = yardstick_word(yardstick)
    return f"{WORDS.get(word, word)} {worded(value, unit)}"


def worded(value: float, unit: str) -> str:
    """A value with its unit, on one line; shares become percent."""
    if unit == "%":
        return (
            f"{100 * value:.2f}\N{NO-BREAK SPACE}%"
            if 0 < value < 0.01
            else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        )
    return f"{value:.2f}\N{NO-BREAK SPACE}{unit}" if unit else spoken(value)
