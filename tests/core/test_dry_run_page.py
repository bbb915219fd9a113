"""What a dry run prints, what it refuses, and what it says of saves, shards and clusters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import STACK, run, write_stack

from benchmarks import memory
from benchmarks.cluster import Cluster
from vtp_core.announcing import announced
from vtp_core.data.manifest import FORMAT
from vtp_core.dryrun.data import dealt
from vtp_core.dryrun.notes import Collective
from vtp_core.dryrun.run import DryRun
from vtp_core.dryrun.writing import RATE, Checkpoint
from vtp_core.stack import load_stack


def test_a_dry_run_on_64_processes_needs_neither_data_nor_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STACK.replace("{use: emoji, batch_size: 16, workers: 0}", "{use: webdataset, batch_size: 256}")
    arguments = ["train", str(write_stack(tmp_path, text)), "--dry-run", "--world-size", "64"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "64 processes (gloo, replicated) x 4 rows x 1 micro-batch = batch_size 256" in out
    assert "clip 4, dino 1, ibot 1, koleo 1, reconstruction 1" in out
    for word in ("optimizer state", "kept by autograd", "all-reduce: gradients", "checkpoint  ", "saving  "):
        assert word in out
    assert (
        "samples are dealt by position: every process opens every shard it needs (data.path: is missing)"
        in out
    )
    assert not torch.distributed.is_initialized()


def test_its_numbers_are_there_for_programs(tmp_path: Path) -> None:
    found = DryRun(load_stack(str(write_stack(tmp_path)), ["train.accumulate=2"]), 2).data
    assert json.loads(json.dumps(found)) == found
    assert found["batch"] == {
        "images": 16, "processes": 2, "micro_batches": 2, "rows": 4,
        "rows_by_objective": {"clip": 4, "dino": 1, "ibot": 1, "koleo": 1, "reconstruction": 1},
    }  # fmt: skip
    gradients = next(row for row in found["communication"] if row["cause"] == "gradients")
    assert gradients["bytes"] == found["memory"]["gradients"]  # a ring of two sends everything once
    (line,) = announced(memory.engine_of(load_stack(str(tmp_path / "small.yaml"), ["train.accumulate=2"]))[0])
    assert found["announced"] == [line.replace("1 process x 8", "2 processes (gloo, replicated) x 4")]
    assert found["checkpoint"]["bytes"] == sum(found["checkpoint"]["files"].values())


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vtp_core.costs.build")
    code, _, errors = run(capsys, "train", "vtp-tiny", "--dry-run", "--world-size", "64")
    assert code == 2
    assert "do not divide by 64 processes" in errors and "use data.batch_size=512" in errors


@pytest.mark.parametrize("typo", ["data.batchsize=3", "probes.rank_me.evry=3"])
def test_a_typo_where_nothing_is_planned_is_refused_too(
    typo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vtp_core.costs.build")
    code, _, errors = run(capsys, "train", "vtp-tiny", "--dry-run", typo)
    assert code == 2 and f"unknown option '{typo.split('=')[0].rpartition('.')[2]}'" in errors


@pytest.mark.slow
def test_vtp_l_on_64_processes_takes_no_minute(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    began = time.process_time()
    code, out, _ = run(capsys, "train", "vtp-l", "--dry-run", "--world-size", "64")
    assert code == 0 and "x 256 rows x 1 micro-batch = batch_size 16384" in out
    assert time.process_time() - began < 60


# ---- saves and shards


def test_a_save_that_outlasts_the_grace_period_comes_with_advice() -> None:
    assert not Checkpoint({"tokenizer": 10}, 1, 10).advice
    large = int(50 * RATE)
    assert (
        "--shutdown-timeout 100, or train.parallel=fsdp2" in Checkpoint({"optimizer": large}, 1, large).advice
    )
    assert "fsdp2" not in Checkpoint({"optimizer": large}, 8, 8 * large).advice


def test_shards_are_told_from_the_manifest_and_not_opened(tmp_path: Path) -> None:
    names = [f"{index}.tar" for index in range(10)]
    for name in names:
        (tmp_path / name).touch()
    shards = [{"name": n, "bytes": 1, "sha256": "0" * 64, "samples": 20, "fields": ["image"]} for n in names]
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "shards": shards, "names": {}}))
    found = dealt(load_stack("vtp-tiny", ["data.use=webdataset", f"data.path={tmp_path}"]))
    assert (len(found.shards), found.samples, found.window) == (10, 200, 8)
    assert dealt(load_stack("vtp-tiny")).unknown == "emoji has no manifest"


# ---- the simulation


def test_a_cluster_sends_in_rings_within_machines_and_among_them() -> None:
    cluster = Cluster(inside=100.0, outside=10.0, call=0.0, doubling=0.0)
    reduce, gather = (Collective(kind, "gradients", "", 800) for kind in ("all_reduce", "all_gather"))
    assert cluster.seconds(gather, 1) == 0
    assert cluster.seconds(gather, 4) == pytest.approx(3 / 4 * 800 / 100)
    assert cluster.seconds(gather, 16) == pytest.approx(7 / 8 * 800 / 100 + 1 / 2 * 100 / 10)
    assert cluster.seconds(reduce, 16) == pytest.approx(2 * cluster.seconds(gather, 16))
    with pytest.raises(ValueError, match="12 GPUs fill no whole number of machines of 8"):
        cluster.seconds(reduce, 12)


def test_a_step_that_has_no_room_on_a_gpu_is_told() -> None:
    assert Cluster().fits(76 * 10**9) and not Cluster().fits(77 * 10**9)
