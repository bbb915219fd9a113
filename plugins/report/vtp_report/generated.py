"""Samples by label, without and with guidance from the same noise, a real image beside each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_report.draws import Draws
from vtp_report.pictures import Picture, picture

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Made:
    """One label or caption: what the generator should reach, and what it makes."""

    name: str
    real: Picture | None
    reconstruction: Picture | None
    plain: list[Picture]
    guided: list[Picture]


@dataclass(frozen=True, slots=True)
class Grid:
    """All rows; ``protocols`` says for each way of sampling how, with its forwards per sample."""

    rows: list[Made]
    count: int
    seed: int
    field: str
    guided: bool
    protocols: list[tuple[str, str, int]]


def grid(draws: Draws) -> Grid:
    """The samples of all conditions."""
    ways = [("without guidance", draws.plain, False)]
    if draws.guided is not None:
        ways.append(("guided", draws.guided, True))
    made = {guided: draws.samples(guided) for _, _, guided in ways}  # counts evaluations too
    rows = []
    for place, condition in enumerate(draws.conditions):
        name = condition.name
        rows.append(
            Made(
                name=name,
                real=picture(condition.real, f"real, {name}") if condition.real is not None else None,
                reconstruction=_reconstruction(draws.plain.tokenizer, condition.real, name),
                plain=_row(made[False][place], f"{name}, without guidance"),
                guided=_row(made[True][place], f"{name}, guided") if True in made else [],
            )
        )
    return Grid(
        rows=rows,
        count=draws.count,
        seed=draws.seed,
        field=str(draws.plain.condition or ""),
        guided=draws.guided is not None,
        protocols=[(words, way.protocol, way.evaluations) for words, way, _ in ways],
    )


def _row(samples: Tensor, words: str) -> list[Picture]:
    return [picture(x, f"{words}, noise {number}") for number, x in enumerate(samples)]


def _reconstruction(tokenizer: Any, real: Tensor | None, name: str) -> Picture | None:
    if real is None:
        return None
    decoded = tokenizer.decode(tokenizer.encode(real[None].to(tokenizer.device)))[0]
    return picture(decoded, f"reconstruction, {name}")
