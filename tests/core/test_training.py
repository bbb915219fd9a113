"""Runs from start to end: what they leave, how they resume, what stops them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import write_stack

from vtp_core import Tokenizer, load_stack, train
from vtp_core.cli import main
from vtp_core.errors import DataFault, NonFinite, StackFault
from vtp_core.run import checkpoint
from vtp_core.run.metrics import read
from vtp_core.stack import load_run_stack
from vtp_core.training import Training
from vtp_plugins.registry import Registry

QUIET = ("time/", "images_per_second")


def stream(run: Path) -> list[str]:
    """The metrics as text, without what depends on the clock on the wall."""
    rows = [{k: v for k, v in row.items() if not k.startswith(QUIET)} for row in read(run / "metrics.jsonl")]
    return [json.dumps(row) for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed run of the small stack."""
    folder = tmp_path_factory.mktemp("finished")
    return train(load_stack(write_stack(folder), [f"run.dir={folder / 'run'}"])).path


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    for name in ("stack.yaml", "metrics.jsonl", "plan.txt", "plan.json", "environment.json", "run.json"):
        assert (finished / name).is_file(), name
    rows = read(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    keys = set(rows[0])
    assert {
        "loss",
        "dino/global",
        "weight/clip",
        "lr/encoder",
        "grad/encoder",
        "time/step",
        "time/data",
    } <= keys
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


def test_the_loss_is_the_weighted_sum_of_its_terms(finished: Path) -> None:
    row = read(finished / "metrics.jsonl")[0]
    names = ("clip", "dino", "ibot", "koleo", "reconstruction")
    total = sum(row[f"weight/{n}"] * v for n in names for k, v in row.items() if k.startswith(f"{n}/"))
    assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_the_same_stack_gives_the_same_stream(finished: Path, tmp_path: Path) -> None:
    again = train(load_stack(finished / "stack.yaml", [f"run.dir={tmp_path / 'run'}"])).path
    assert stream(again) == stream(finished)


def test_workers_do_not_change_the_stream(finished: Path, tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", "data.workers=2"]
    assert stream(train(load_stack(finished / "stack.yaml", overrides)).path) == stream(finished)


def test_a_run_resumes_bit_for_bit_after_sigkill(finished: Path, tmp_path: Path) -> None:
    """Killed at random moments until it is through; the stream and the weights are the undisturbed run's."""
    dice = random.Random(0)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vtp_core", "train", str(finished / "stack.yaml"), f"run.dir={run}"]
    kills = 0
    while True:
        process = subprocess.Popen(
            command, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wanted = dice.choice([1, 2, 3, 5]) if kills < 3 else 99
        while process.poll() is None:
            written = len(stream(run)) if (run / "metrics.jsonl").exists() else 0
            if written >= wanted and checkpoint.latest(run / "checkpoints") is not None:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        command = [sys.executable, "-m", "vtp_core", "resume", str(run)]
    assert kills >= 2
    assert stream(run) == stream(finished)
    ours, _ = checkpoint.load(run / "checkpoints" / "step-00000006")
    theirs, _ = checkpoint.load(finished / "checkpoints" / "step-00000006")
    for part, tensors in theirs.items():
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part


@pytest.mark.parametrize("part", ["tokenizer", "teacher", "optimizer", "objectives/ibot", "objectives/clip"])
def test_resuming_without_a_part_of_the_state_shows(part: str, finished: Path, tmp_path: Path) -> None:
    """The comparison above sees every group: zeroing one changes the stream."""
    run = tmp_path / "run"
    train(load_stack(finished / "stack.yaml", [f"run.dir={run}"]))
    checkpoint.cut(run / "checkpoints", 4)
    parts, state = checkpoint.load(run / "checkpoints" / "step-00000004")
    parts[part] = {name: torch.zeros_like(tensor) for name, tensor in parts[part].items()}
    checkpoint.save(run / "checkpoints", 4, parts, state)
    try:
        train(load_run_stack(run, Registry()), resume=run)
    except NonFinite:
        return
    assert stream(run) != stream(finished)


def test_sigterm_saves_and_ends_with_75(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", "train.steps=4000", "train.checkpoint_every=4000", "data.workers=1"]
    command = [sys.executable, "-m", "vtp_core", "train", str(finished / "stack.yaml"), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (run / "metrics.jsonl").exists() or not stream(run):
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "vtp resume" in errors.decode()
    assert checkpoint.latest(run / "checkpoints") is not None


def test_a_loss_that_is_not_finite_stops_before_weights_move(finished: Path, tmp_path: Path) -> None:
    run = Training(load_stack(finished / "stack.yaml", [f"run.dir={tmp_path / 'run'}"]))
    weight = run.model.objectives["clip"].get_parameter("logit_scale")
    with torch.no_grad():
        weight.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in run.engine.state()["tokenizer"].items()}
    with pytest.raises(NonFinite, match="clip"):
        run.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in run.engine.state()["tokenizer"].items())


def test_an_objective_without_its_field_names_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.transforms.v2.functional import to_pil_image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(40):
        to_pil_image(torch.randint(0, 255, (3, 40, 48), dtype=torch.uint8)).save(pictures / f"{index}.png")
    stack = str(write_stack(tmp_path))
    folder = ["data.use=image_folder", f"data.root={pictures}"]
    with pytest.raises(SystemExit) as ended:
        main(["train", stack, *folder, f"run.dir={tmp_path / 'a'}"])
    assert ended.value.code == 4
    assert "objectives.clip=null" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["train", stack, *folder, "objectives.clip=null", f"run.dir={tmp_path / 'b'}"])
    assert ended.value.code == 0


def test_a_tokenizer_loads_without_its_objectives(finished: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(finished)
    images = torch.rand(2, 3, 32, 32)
    z = tokenizer.encode(images)
    assert z.shape == (2, 8, 4, 4)
    assert tokenizer.decode(z).shape == images.shape
    assert tokenizer.features(images).patches.shape == (2, 16, 32)
    assert tokenizer.features(images).grid == (4, 4)
    standard = tokenizer.encode(images, standardized=True)
    assert torch.allclose(tokenizer.decode(standard, standardized=True), tokenizer.decode(z), atol=1e-4)
    assert tokenizer.encode(torch.rand(1, 3, 16, 48)).shape == (1, 8, 2, 6)


def test_exports_travel_with_the_tokenizer(finished: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(finished)
    text, image = (
        tokenizer.embed_text(["a red circle", "cat"]),
        tokenizer.embed_image(torch.rand(3, 3, 32, 32)),
    )
    assert text.shape == (2, 16)
    assert image.shape == (3, 16)
    assert torch.allclose(text.norm(dim=-1), torch.ones(2), atol=1e-5)


def test_the_ema_teacher_is_another_tokenizer(finished: Path) -> None:
    images = torch.rand(1, 3, 32, 32)
    student, teacher = (Tokenizer.from_pretrained(finished, weights=w) for w in ("student", "ema"))
    assert not torch.equal(student.features(images).cls, teacher.features(images).cls)


def test_a_missing_export_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    run = train(
        load_stack(
            finished / "stack.yaml", [f"run.dir={tmp_path / 'run'}", "objectives.clip=null", "train.steps=1"]
        )
    )
    with pytest.raises(LookupError, match="embed_text"):
        Tokenizer.from_pretrained(run.path).embed_text(["x"])


def test_statistics_standardise_the_latent(finished: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(finished)
    from vtp_core.evaluation import bench_of

    _, bench = bench_of(finished)
    z = torch.cat([tokenizer.encode(batch, standardized=True) for batch in bench.images("train")])
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_no_such_run_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="no run directory"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(StackFault):
        load_stack(tmp_path / "absent.yaml")


def test_encode_and_decode_files(finished: Path, tmp_path: Path) -> None:
    from torchvision.transforms.v2.functional import to_pil_image

    to_pil_image(torch.randint(0, 255, (3, 70, 50), dtype=torch.uint8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as ended:
        main(["encode", str(finished), str(tmp_path / "a.png"), "-o", str(tmp_path / "z.safetensors")])
    assert not ended.value.code
    with pytest.raises(SystemExit) as ended:
        main(["decode", str(finished), str(tmp_path / "z.safetensors"), "-o", str(tmp_path / "out")])
    assert not ended.value.code
    assert (tmp_path / "out" / "00000.png").is_file()
