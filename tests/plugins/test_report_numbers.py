"""The report's numbers and curves: latest values, protocols, yardsticks, and what a chart leaves out."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from vtp_report.charts import losses, probe_curves, schedules
from vtp_report.curves import Series, draw, running_mean
from vtp_report.headline import cards
from vtp_report.numbers import family, spoken, tables, yardstick_of
from vtp_report.record import AbsentError


def row(
    probe: str, split: str, value: float, step: int = 20, protocol: str = "a protocol", n: int = 6
) -> dict[str, Any]:
    return {"step": step, "probe": probe, "split": split, "value": value, "n": n, "protocol": protocol}


READINGS = [
    *(row("reconstruction/psnr", "train", 20 + at, at) for at in (10, 20)),
    row("reconstruction/psnr", "unseen_style", 18.5),
    row(
        "zero_shot/text_to_image_top1",
        "unseen_style",
        0.15,
        protocol="1,667 captions | chance of top-1 0.06 %",
    ),
    *(row("knn/cls/concept@train", "unseen_style", at / 100, at) for at in (10, 20)),
    *(row("knn/pixels8/concept@train", "unseen_style", 0.41, at) for at in (10, 20)),
    row("fd_lite0", "unseen_style", 88.1),
    row("fd_lite0/floor", "unseen_style", 21.1),
]


def test_the_latest_value_is_tabled_with_its_protocol() -> None:
    psnr = next(table for table in tables(READINGS) if table.probe == "reconstruction").lines[0]
    assert [cell and cell.value for cell in psnr.cells] == ["40", "18.5"]
    assert psnr.protocols == ["a protocol"]
    floor = next(table for table in tables(READINGS) if table.probe == "fd_lite0").lines[1]
    assert floor.yardstick


def test_headlines_stand_beside_their_yardsticks() -> None:
    found = {card.label: card for card in cards(READINGS)}
    same = found["nearest neighbour is the same concept"]
    assert (same.value.split(), same.fill, same.mark) == (["20.0", "%"], 0.2, 0.41)
    assert found["a caption finds its image, top-1"].mark == pytest.approx(0.0006)
    assert cards([]) == []


def test_yardsticks_are_found_by_name() -> None:
    names = ["knn/cls/label@train", "knn/pixels8/label@train", "knn/pixels8/label@google", "fd_lite0/floor"]
    assert yardstick_of("knn/latent/label@google", names) == "knn/pixels8/label@google"
    assert yardstick_of("fd_lite0", names) == "fd_lite0/floor"
    assert yardstick_of("rank_me/cls", names) == ""
    assert family("knn/cls/label@train") == "knn/label@train"


def test_numbers_are_spoken_with_four_digits() -> None:
    assert [spoken(x) for x in (0.123456, 23.4567, 0.00012, 12345.6, 0.0)] == [
        "0.1235",
        "23.46",
        "1.20e-04",
        "12,346",
        "0",
    ]
    assert spoken(math.nan) == "nan"


def test_running_means_are_centred_and_short_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])


def test_charts_name_every_term_and_keep_non_finite_steps_out() -> None:
    rows: list[dict[str, Any]] = [
        {"step": at, "loss": 1.0, "clip/term": 2.0, "weight/clip": 1.0} for at in range(1, 30)
    ]
    rows[5]["clip/term"] = math.nan
    assert [(chart.title, chart.last) for chart in losses(rows)] == [("loss", "1"), ("clip/term", "2")]
    assert "nan" not in losses(rows)[1].svg
    assert [chart.title for chart in schedules(rows)] == ["weights"]
    with pytest.raises(AbsentError, match="missing or empty"):
        losses([])


def test_probe_curves_put_headlines_first_with_their_yardstick_dashed() -> None:
    curves = probe_curves([*READINGS, row("rank_me/cls", "train", 3.0, 10), row("rank_me/cls", "train", 4.0)])
    assert [chart.title for chart in curves.main] == ["reconstruction/psnr", "knn/concept@train"]
    assert [(e.name, e.dashed) for e in curves.main[1].legend] == [("cls", False), ("pixels8", True)]
    assert [chart.title for chart in curves.others] == ["rank_me"]


def test_a_chart_takes_its_colours_from_the_page_and_keeps_digits_of_its_ticks() -> None:
    svg = draw([Series("a", [0, 1, 2], [0.01, 0.02, 0.03], slot=2)])
    assert svg.startswith("<svg")
    assert "var(--s2)" in svg
    assert "#0102" not in svg
    assert re.search(r">0\.0[12]\d*</text>", svg)
    assert "id=" not in re.sub(r'<clipPath id="p\w+"', "", svg)


# ---- of samples


def sampled(probe: str, value: float, step: int) -> dict[str, Any]:
    return row(f"generation/{probe}", "train", value, step)


SAMPLED = [
    reading
    for step, value in ((10, 900.0), (20, 300.0))
    for reading in (
        sampled("fd_lite0", value, step),
        sampled("fd_lite0/floor", 61.0, step),
        sampled("fd_lite0/reconstructions", 120.0, step),
        sampled("fd_lite0/noise", 2500.0, step),
        sampled("kid_lite0", value * 2, step),
        sampled("precision_lite0", 0.5, step),
    )
]


def test_the_distance_of_samples_stands_beside_its_three_yardsticks() -> None:
    first, second = cards(SAMPLED)
    assert (first.label, first.value) == ("samples, FD-lite0", "300")
    assert first.beside == ["floor 61", "the tokenizer's reconstructions 120", "decoded noise 2,500"]
    assert second.fill == 0.5


def test_distances_fall_over_training_above_floor_and_reconstructions() -> None:
    curves = probe_curves(SAMPLED)
    assert [chart.title for chart in curves.main] == ["generation/fd_lite0", "generation/precision_lite0"]
    legend = [(entry.name, entry.dashed) for entry in curves.main[0].legend]
    assert legend == [("train", False), ("floor, train", True), ("reconstructions, train", True)]
    assert len({entry.slot for entry in curves.main[0].legend[1:]}) == 2
    assert [chart.title for chart in curves.others] == ["generation/kid_lite0"]


def test_the_table_sets_yardsticks_apart() -> None:
    (table,) = tables(SAMPLED)
    assert [(line.metric, line.yardstick) for line in table.lines] == [
        ("fd_lite0", False), ("fd_lite0/floor", True), ("fd_lite0/reconstructions", True),
        ("fd_lite0/noise", True), ("kid_lite0", False), ("precision_lite0", False),
    ]  # fmt: skip
