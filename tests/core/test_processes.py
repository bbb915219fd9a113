"""Two real processes over gloo are one process with the whole batch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image
from pool import Pool
from rig import close
from small import write_stack
from test_shards import write
from two import stopped, trained

from vtp_core import load_stack
from vtp_core.agreement import Drifted
from vtp_core.data.manifest import write_manifest
from vtp_core.training import Training


def test_two_processes_train_as_one_does(two: Pool) -> None:
    both, one = two(trained), trained()
    for found in both:
        close(found["gradients"], one["gradients"])
        for ours, alone in zip(found["rows"], one["rows"], strict=True):
            assert ours == pytest.approx(alone, rel=1e-9, abs=1e-12)
        close(found["weights"], one["weights"], 1e-8)  # Adam divides by roots of what is nearly zero
    close(both[0]["weights"], both[1]["weights"], 0)


def test_a_nan_on_one_process_stops_both(two: Pool) -> None:
    first, second = two(stopped)
    assert first == second
    assert "sick/sick" in first


# ---- whole runs


LESS = ["data.workers=2", *(f"~objectives.{name}" for name in ("clip", "ibot", "koleo"))]


def run(stack: Path, out: Path, overrides: list[str]) -> str:
    """Train; what it says if weights drift."""
    training = Training(load_stack(stack, [*LESS, *overrides, f"run.dir={out}"]))
    step = training.engine.step

    def flipped(inputs: Any) -> dict[str, float]:
        row = step(inputs)
        if dist.is_initialized() and dist.get_rank() == 1 and training.engine.steps_done == 3:
            next(iter(training.engine.model.encoder.parameters())).data.view(-1)[0].neg_()
        return row

    if "train.check_every=2" in overrides:
        training.engine.step = flipped  # type: ignore[method-assign]
    try:
        training.run()
    except Drifted as fault:
        return f"{fault.code}: {fault}"
    return ""


def losses(path: Path) -> list[float]:
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


def test_one_shard_feeds_two_processes_with_two_workers_each(two: Pool, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    files = [(f"{i:02d}.png", png(i)) for i in range(12)]  # fewer samples than a batch of 16, too
    write(tmp_path / "shards" / "only.tar", files)
    write_manifest(tmp_path / "shards")
    data = ["data.use=webdataset", f"data.path={tmp_path / 'shards'}", "train.steps=3"]
    run(write_stack(tmp_path), tmp_path / "one", data)
    two(run, tmp_path / "small.yaml", tmp_path / "two", data)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_run_whose_weights_drift_apart_ends_and_saves_nothing_of_it(two: Pool, tmp_path: Path) -> None:
    keys = ["train.check_every=2", "train.checkpoint_every=2"]
    said = two(run, write_stack(tmp_path), tmp_path / "run", keys)
    assert said[0] == said[1]
    assert said[0].startswith("75: step 4: the processes differ in tokenizer/encoder.")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 36), 20.0 + number).convert("RGB").save(stream, "PNG")
    return stream.getvalue()
