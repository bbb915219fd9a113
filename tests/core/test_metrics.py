"""Rows are strict JSON, complete, and each step is there once."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtp_core.errors import DataFault, StorageFault
from vtp_core.run import metrics
from vtp_core.run.metrics import JsonLines


def test_rows_come_back_as_they_were_and_equal_numbers_are_equal_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"step": 1, "loss": 0.1 + 0.2, "clip/contrast": 1e-300, "split": "tränen 😂\n", "none": None}
    with JsonLines(path) as file:
        file.append(row)
        assert metrics.read(path) == [row]  # before any close
        file.append(row)
        file.sync()
    first, second = path.read_text().splitlines()
    assert first == second
    assert "0.30000000000000004" in first


def test_numbers_that_json_lacks_are_strings_in_the_file_and_floats_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        file.append({"step": 1, "a": math.nan, "b": -math.inf, "c": math.inf, "deep": {"x": [math.nan]}})

    def refuse(name: str) -> float:
        raise AssertionError(name)

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert strict == {"step": 1, "a": "NaN", "b": "-Infinity", "c": "Infinity", "deep": {"x": ["NaN"]}}
    (row,) = metrics.read(path)
    assert math.isnan(row["a"]) and row["b"] == -math.inf and row["c"] == math.inf


def test_scalars_of_torch_are_numbers(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as file:
        file.append({"step": torch.tensor(3), "loss": torch.tensor(0.5), "bad": torch.tensor(math.inf)})
    assert metrics.read(tmp_path / "m.jsonl") == [{"step": 3, "loss": 0.5, "bad": math.inf}]


def test_a_torn_last_line_is_left_out_and_the_next_row_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as file:
        file.append({"step": 1})
    with path.open("a") as raw:
        raw.write('{"step": 2, "long": "' + "x" * 200_000)
    assert metrics.read(path) == [{"step": 1}]
    with JsonLines(path) as file:
        file.append({"step": 2})
    assert metrics.read(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1')
    with JsonLines(path) as file:
        file.append({"step": 1})
    assert path.read_text() == '{"step": 1}\n'


def test_cut_removes_rows_past_a_step_and_changes_no_other_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "x":1.10}\n{"probe": "no step"}\n{"step": 3}\n{"step": 2}\n{"st')
    file = JsonLines(path)
    assert file.cut(2) == 1
    assert path.read_text() == '{"step": 1, "x":1.10}\n{"probe": "no step"}\n{"step": 2}\n'
    before = path.stat().st_ino
    assert file.cut(2) == 0
    assert path.stat().st_ino == before
    file.append({"step": 3})
    assert file.cut(0) == 3
    assert JsonLines(tmp_path / "absent.jsonl").cut(5) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_cut_ends_a_torn_line_even_where_no_row_goes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert JsonLines(path).cut(5) == 0
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["nonsense", "[1]", "\0\0", "[" * 100_000])
def test_a_broken_line_inside_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(DataFault, match="line 2"):
        metrics.read(path)


def test_a_missing_or_linked_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="No such file"):
        metrics.read(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").symlink_to("/etc/hostname")
    with pytest.raises(DataFault, match="symlink"):
        metrics.read(tmp_path / "m.jsonl")
    with pytest.raises(StorageFault, match="symlink"):
        JsonLines(tmp_path / "m.jsonl").append({"step": 1})


def test_a_full_disk_leaves_no_half_row(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl")
    file.append({"step": 1})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(StorageFault, match="make room, then: vtp resume"):
            file.append({"step": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.append({"step": 2})
    assert metrics.read(file.path) == [{"step": 1}, {"step": 2}]


def test_a_row_outlives_the_process_that_wrote_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from vtp_core.run.metrics import JsonLines\n"
        "JsonLines(Path(sys.argv[1])).append({'step': 1}); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.jsonl")], env=os.environ, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert metrics.read(tmp_path / "m.jsonl") == [{"step": 1}]
