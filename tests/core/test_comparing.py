"""Numbers of runs side by side: the latest of each, and none that was measured otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtp_core.comparing import compare
from vtp_core.errors import DataFault, StackFault


def run(folder: Path, *rows: dict[str, Any], data: str | None = None) -> Path:
    folder.mkdir()
    base = {"step": 10, "split": "val", "n": 100, "protocol": "cosine"}
    lines = [json.dumps(base | row) for row in rows]
    (folder / "probes.jsonl").write_text("\n".join(lines) + "\n")
    if data is not None:
        (folder / "environment.json").write_text(json.dumps({"data": data}))
    return folder


def test_the_latest_readings_stand_side_by_side(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"probe": "knn", "value": 0.25}, {"probe": "knn", "value": 0.5, "step": 20})
    b = run(tmp_path / "b", {"probe": "knn", "value": 0.75, "step": 20}, {"probe": "rank", "value": 12.0})
    found = compare([a, b])
    assert [(row["probe"], list(row["values"].values())) for row in found.data] == [
        ("knn", [0.5, 0.75]),
        ("rank", [12.0]),
    ]
    lines = str(found).splitlines()
    assert lines[0].split() == ["probe", "split", str(a), str(b)]
    assert lines[1].split() == ["knn", "val", "0.5", "0.75"]
    assert lines[2].split() == ["rank", "val", "-", "12"]
    assert lines[-1] == "knn, rank: cosine"
    assert "mind" not in str(found)


def test_different_protocols_are_refused_and_both_are_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"probe": "fd", "value": 1, "protocol": "n 500"}, {"probe": "knn", "value": 1})
    b = run(tmp_path / "b", {"probe": "fd", "value": 2, "protocol": "n 50"}, {"probe": "knn", "value": 2})
    with pytest.raises(StackFault) as caught:
        compare([a, b])
    assert caught.value.code == 2
    for words in (f"{a}: n 500", f"{b}: n 50", "fd (split val)", "--only knn"):
        assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 6  # what the command line shows of a message
    assert [row["probe"] for row in compare([a, b], only=["knn"]).data] == ["knn"]
    with pytest.raises(StackFault):
        compare([a, b], only=["fd"])


def test_only_takes_whole_names_first_parts_and_patterns(tmp_path: Path) -> None:
    names = ("gen/fd", "gen/fd/floor", "gen/kid", "general")
    a = run(tmp_path / "a", *({"probe": name, "value": 1} for name in names))
    for only, expected in (("gen", 3), ("gen/fd", 2), ("gen/*", 3), ("general", 1), ("*kid", 1)):
        assert len(compare([a], only=[only]).rows) == expected
    with pytest.raises(StackFault, match="did you mean 'gen/kid'"):
        compare([a], only=["gen/kit"])


def test_steps_samples_and_data_that_differ_are_told(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"probe": "knn", "value": 1}, data="0" * 64)
    b = run(tmp_path / "b", {"probe": "knn", "value": 1, "n": 99, "step": 30}, data="1" * 64)
    text = str(compare([a, b]))
    assert "mind knn (val): of 100, 99 samples" in text
    assert f"mind steps: {a} 10, {b} 30" in text
    assert f"mind different data: {a} 000000000000, {b} 111111111111" in text


def test_a_folder_without_probes_says_where_some_are(tmp_path: Path) -> None:
    (tmp_path / "pipeline" / "stages").mkdir(parents=True)
    inside = run(tmp_path / "pipeline" / "stages" / "generator", {"probe": "knn", "value": 1})
    with pytest.raises(DataFault, match=str(inside)):
        compare([tmp_path / "pipeline"])
    with pytest.raises(DataFault, match=r"has no probes\.jsonl$"):
        compare([tmp_path / "absent"])
    with pytest.raises(StackFault, match="different runs"):
        compare([inside, inside])


def test_a_file_of_rows_stands_for_a_run(tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"probe": "knn", "value": 1})
    b = run(tmp_path / "b", {"probe": "knn", "value": float("nan")})
    found = compare([a, b / "probes.jsonl"])
    assert "nan" in str(found)
