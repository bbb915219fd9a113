"""Checkpoints whose weights several processes hold: written by all of them, read by any number, lost by none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import recipe
import torch
from dealt import (
    crowded,
    killed,
    loss_error,
    resumed,
    row_error,
    saved,
    saved_whole,
    state_error,
    stopped,
    trained,
)
from pool import Pool
from torch import Tensor, nn

from vtp_core.cli import main
from vtp_core.errors import StorageFault
from vtp_core.run import checkpoint, manifest
from vtp_core.tokenizer import Tokenizer

NAME = "vtp with a generator"
DEALT: dict[str, Any] = {"precision": "float64", "parallel": "fsdp2"}
WHOLE: dict[str, Any] = {"precision": "float64", "parallel": "replicated"}


def after(found: dict[str, Any], at: int) -> dict[str, Any]:
    return {"rows": found["rows"][at:], "state": found["state"]}


def test_a_run_goes_on_in_any_number_of_processes_and_in_either_mode(two: Pool, tmp_path: Path) -> None:
    one = after(trained(NAME, 4, DEALT), 2)
    pair, *_ = two(stopped, NAME, 2, 4, str(tmp_path / "pair"), DEALT)
    single = stopped(NAME, 2, 4, str(tmp_path / "one"), WHOLE)
    again = two(resumed, NAME, 4, str(tmp_path / "pair"), DEALT)[0]
    assert again["rows"] == pair["rows"]
    assert all(torch.equal(value, pair["state"][key]) for key, value in again["state"].items())
    others = [
        two(resumed, NAME, 4, str(tmp_path / "pair"), WHOLE)[0],
        two(resumed, NAME, 4, str(tmp_path / "one"), DEALT)[0],
        resumed(NAME, 4, str(tmp_path / "pair"), DEALT),
    ]
    for found in (single, pair, *others):
        assert row_error(found, one) <= 1e-10
        assert state_error(found, one) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vtp", "vtp with a gan", NAME])
@pytest.mark.parametrize(("precision", "losses"), [("float32", 1e-6), ("float64", 1e-10)])
def test_a_run_goes_on_in_twice_as_many_processes(
    two: Pool, four: Pool, tmp_path: Path, name: str, precision: str, losses: float
) -> None:
    for mode in (DEALT, WHOLE):
        folder = str(tmp_path / mode["parallel"])
        whole = two(stopped, name, 2, 5, folder, {**mode, "precision": precision})[0]
        for other in (DEALT, WHOLE):
            for pool in (two, four):
                found = pool(resumed, name, 5, folder, {**other, "precision": precision})[0]
                assert loss_error(found, whole) <= losses


# ---- files


def test_each_process_writes_its_rows_and_the_first_what_all_hold(two: Pool, tmp_path: Path) -> None:
    two(saved, str(tmp_path), (1,))
    path = tmp_path / "step-00000001"
    assert sorted(file.name for file in path.iterdir()) == [
        "layer.rank-00001-of-00002.safetensors", "layer.rank-00002-of-00002.safetensors", "layer.safetensors",
        "manifest.json", "plain.safetensors", "state.json",
    ]  # fmt: skip
    parts, state = checkpoint.load(path)
    torch.manual_seed(1)
    layer = nn.Linear(64, 5)
    assert state == {"seed": 1}
    assert torch.equal(parts["layer"]["weight"], layer.weight)
    assert torch.equal(parts["layer"]["bias"], layer.bias)
    assert parts["layer"]["count"] == 1
    assert json.loads((path / "manifest.json").read_text())["format"] == 2


def test_rows_are_read_without_the_others(two: Pool, tmp_path: Path) -> None:
    two(saved, str(tmp_path), (1,))
    part = checkpoint.opened(tmp_path / "step-00000001")["layer"]
    whole: Tensor = part["weight"]
    for first in range(6):
        for end in range(first, 6):
            assert torch.equal(part.rows("weight", first, end), whole[first:end])
    assert part.shape("weight") == (5, 64)
    assert "weight" in part
    assert set(part.under("we")) == {"ight"}


def test_processes_that_hold_all_weights_write_what_one_would(two: Pool, tmp_path: Path) -> None:
    two(saved_whole, str(tmp_path / "two"))
    saved_whole(str(tmp_path / "one"))
    files = [sorted((tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_what_is_loaded_and_saved_again_is_what_one_process_writes(two: Pool, tmp_path: Path) -> None:
    two(saved, str(tmp_path / "two"), (1,))
    parts, state = checkpoint.load(tmp_path / "two" / "step-00000001")
    path = checkpoint.save(tmp_path / "one", 1, parts, state)
    assert checkpoint.load(path)[0].keys() == parts.keys()
    assert sorted(file.name for file in path.iterdir()) == [
        "layer.safetensors", "manifest.json", "plain.safetensors", "state.json",
    ]  # fmt: skip


def test_missing_rows_are_a_broken_checkpoint(two: Pool, tmp_path: Path) -> None:
    two(saved, str(tmp_path), (1, 2))
    path = tmp_path / "step-00000002"
    body = json.loads((path / "manifest.json").read_text())
    del body["files"]["layer.rank-00002-of-00002.safetensors"]
    body["sha256"] = manifest._digest(body)
    (path / "manifest.json").write_text(json.dumps(body))
    for read in (checkpoint.load, checkpoint.opened):
        with pytest.raises(StorageFault, match=r"step-00000002 is broken: bias: row 3 is in no file"):
            read(path)
    (path / "layer.rank-00001-of-00002.safetensors").unlink()
    found = checkpoint.latest(tmp_path, lambda _: None)
    assert found is not None
    assert checkpoint.step_of(found) == 1


def test_a_full_disk_of_one_process_stops_all_and_loses_nothing(two: Pool, tmp_path: Path) -> None:
    first, second = two(crowded, str(tmp_path))
    assert "process 1: File too large" in first
    assert "File too large" in second
    assert "checkpoints written before are intact; make room, then: vtp resume" in first
    for step in (1, 3):
        assert checkpoint.load(tmp_path / f"step-{step:08d}")[1] == {"seed": step}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_while_all_save_leaves_the_last_checkpoint(
    two: Pool, tmp_path: Path, rank: int
) -> None:
    with pytest.raises(RuntimeError):
        two(killed, str(tmp_path), rank)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert checkpoint.step_of(found) == 1
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    two(saved, str(tmp_path), (3,))
    shutil.rmtree(tmp_path / "step-00000001")
    assert checkpoint.load(tmp_path / "step-00000003")[1] == {"seed": 3}


@pytest.mark.slow
def test_a_whole_run_resumes_bit_by_bit_and_reads_as_any_other(two: Pool, tmp_path: Path) -> None:
    whole, other = two("recipe.trained", str(tmp_path), "dealt", "train.parallel=fsdp2")
    assert whole == other
    for step in (3, 6):  # the critic learns; the decoder is paid for deceiving it
        found = two("recipe.resumed", str(recipe.killed(Path(whole["run"]), step, f"from-{step}")))[0]
        assert found["stream"] == whole["stream"]
        assert found["hash"] == whole["hash"]
    run = Path(whole["run"])
    written = recipe.killed(run, recipe.STEPS, "written")
    path = written / "checkpoints" / f"step-{recipe.STEPS:08d}"
    parts, state = checkpoint.load(path)
    shutil.rmtree(path)
    checkpoint.save(path.parent, recipe.STEPS, parts, state)
    assert recipe.state_hash(written) == whole["hash"]
    for source in (run, written):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["export", str(source), "--format", "native", "-o", str(tmp_path / f"{source.name} out")])
    files = [sorted((tmp_path / f"{name} out").iterdir()) for name in ("dealt", "written")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
    z = Tokenizer.from_pretrained(run).encode(torch.zeros(1, 3, 32, 32))
    assert torch.equal(z, Tokenizer.from_pretrained(written).encode(torch.zeros(1, 3, 32, 32)))
