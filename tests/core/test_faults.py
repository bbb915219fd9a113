"""Faults of plugins, data, storage and weights: one short message, the right code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import run, write_stack

from vtp_core import attribution
from vtp_core.run import checkpoint, writing
from vtp_core.run.metrics import read

Capture = pytest.CaptureFixture[str]
PLUGIN = ["--plugin", str(Path(__file__).parent / "faulty.py")]
LIGHT = ["objectives.dino=null", "objectives.ibot=null", "objectives.koleo=null"]
MUTE = [*LIGHT, "objectives.clip=null"]


def fault(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that fails: a few lines, no traceback, nothing printed."""
    code, out, errors = run(capsys, *arguments)
    message = errors[errors.index("vtp: ") :]
    assert "Traceback" not in errors
    assert len(message.splitlines()) <= 6
    assert not out
    return code, message


def record(path: Path) -> dict[str, object]:
    return dict(json.loads((path / "run.json").read_text()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    from vtp_core import load_stack, train

    folder = tmp_path_factory.mktemp("finished")
    changes = [f"run.dir={folder / 'run'}", "train.steps=2", "train.checkpoint_every=1"]
    return train(load_stack(write_stack(folder), [*MUTE, *changes])).path


def pictures(folder: Path, count: int = 30) -> Path:
    folder.mkdir()
    dice = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(dice.integers(0, 255, (40, 48, 3), np.uint8)).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.txt").write_text("a 🐈 " + "word " * index, encoding="utf-8")
    return folder


# ---- plugins


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("objectives.fails.way=lookup", 3, r"objectives.fails (the plugin file faulty.py) failed at step 3: KeyError"),
        ("objectives.fails.way=leave", 3, "objectives.fails (the plugin file faulty.py) failed at step 3: SystemExit"),
        ("objectives.fails.way=gpu_memory", 6, "out of memory at step 3: CUDA out of memory"),
        ("objectives.fails.way=memory", 6, "train.accumulate"),
        ("hooks={hook: {event: build}}", 3, "KeyError: 'codebook' (faulty.py, line "),
        ("hooks={hook: {event: step, at: 3}}", 3, "hooks.hook (the plugin file faulty.py) failed at step 3"),
        ("hooks={hook: {event: probe}}", 3, "hooks.hook"),
        ("hooks={hook: {event: finish}}", 3, "the run itself is complete"),
        ("probes={failing: {every: 2}}", 3, "probes.failing"),
    ],
)  # fmt: skip
def test_a_plugin_that_raises_is_named(
    change: str, code: int, words: str, tmp_path: Path, capsys: Capture
) -> None:
    changes = [*MUTE, "train.steps=4", "probes={rank_me: {limit: 8}}", f"run.dir={tmp_path / 'run'}", change]
    ended, message = fault(capsys, "train", str(write_stack(tmp_path)), *PLUGIN, *changes)
    assert (ended, words in message) == (code, True), message
    if "build" in change:
        return
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None
    if "finish" in change:
        assert record(tmp_path / "run")["status"] == "finished"
        return
    assert "continue with: vtp resume" in message
    assert f"--plugin {PLUGIN[1]}" in message
    assert record(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("way", "code", "words"), [("fail", 3, "data (the plugin"), ("flat", 4, "an image view")]
)
def test_a_dataset_that_breaks_the_contract_is_named(
    way: str, code: int, words: str, workers: int, tmp_path: Path, capsys: Capture
) -> None:
    data = ["data.use=faulty", f"data.way={way}", f"data.workers={workers}", f"run.dir={tmp_path / 'run'}"]
    ended, message = fault(capsys, "train", str(write_stack(tmp_path)), *PLUGIN, *MUTE, *data)
    assert (ended, words in message) == (code, True), message


def test_debug_adds_the_traceback(tmp_path: Path, capsys: Capture) -> None:
    changes = [*MUTE, "objectives.fails.at=0", f"run.dir={tmp_path / 'run'}"]
    code, _, errors = run(capsys, "--debug", "train", str(write_stack(tmp_path)), *PLUGIN, *changes)
    assert code == 3
    assert "faulty.py" in errors
    assert "Traceback" in errors


def test_what_is_our_own_fault_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("no such thing")

    monkeypatch.setattr("vtp_core.weights.listing", broken)
    code, message = fault(capsys, "weights", "list")
    assert code == 1
    assert "AssertionError: no such thing\nthis is a bug" in message
    assert attribution.translated(AssertionError()) is None
    full = attribution.translated(OSError(28, "No space left on device", "z"))
    assert full is not None
    assert full.code == 7


# ---- data


def test_broken_pictures_are_skipped_counted_and_named(tmp_path: Path, capsys: Capture) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "zero.png").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "page.jpg").write_text("<html>")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "01.txt").unlink()
    for name in ("zero", "half", "page", "gone"):
        (folder / f"{name}.txt").write_text(name)
    data = ["data.use=image_folder", f"data.root={folder}", "data.holdout=0", f"run.dir={tmp_path / 'run'}"]
    code, _, errors = run(capsys, "train", str(write_stack(tmp_path)), *LIGHT, *data, "train.steps=3")
    assert code == 0
    for words in ("empty file: ", "truncated: ", "not a picture: ", "cannot be read: ", "no text: "):
        assert words in errors
    named = {line.split("\t")[0] for line in (tmp_path / "run" / "skipped.tsv").read_text().splitlines()}
    assert named == {"zero.png", "half.png", "page.jpg", "gone.png", "01.png"}


def test_too_many_broken_pictures_save_the_run_first(tmp_path: Path, capsys: Capture) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "zero.png").write_bytes(b"")
    data = ["data.use=image_folder", f"data.root={folder}", "data.holdout=0", "data.batch_size=64"]
    steps = ["objectives.reconstruction.rows=1.0", "train.steps=20", "train.checkpoint_every=20"]
    changes = [*MUTE, *data, *steps, f"run.dir={tmp_path / 'run'}"]
    code, message = fault(capsys, "train", str(write_stack(tmp_path)), *changes)
    assert code == 4
    assert "is saved; continue with: vtp resume" in message
    assert "zero.png" in (tmp_path / "run" / "skipped.tsv").read_text()


def test_a_folder_that_is_none_says_what_it_is(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("x")
    stack = str(write_stack(tmp_path))
    for name, words in (("file", "it is a file"), ("absent", "there is no folder")):
        code, message = fault(capsys, "train", stack, "data.use=image_folder", f"data.root={tmp_path / name}")
        assert (code, words in message) == (4, True)
    code, message = fault(capsys, "data", "manifest", str(tmp_path / "absent"))
    assert (code, "there is no folder" in message) == (4, True)


# ---- storage


def test_a_full_disk_is_waited_out_and_then_ends_the_run(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, written = writing.save_file, []

    def full(tensors: object, path: Path, **keys: object) -> None:
        written.append(path)
        if "step-00000001" not in str(path):
            raise OSError(28, "No space left on device")
        whole(tensors, path, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "save_file", full)
    changes = [*MUTE, f"run.dir={tmp_path / 'run'}", "train.checkpoint_every=1"]
    code, message = fault(capsys, "train", str(write_stack(tmp_path)), *changes)
    assert code == 7
    assert "step 4 could not be written" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_place_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = str(write_stack(tmp_path))
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    assert fault(capsys, "train", stack)[0] == 7
    assert fault(capsys, "train", stack, "run.dir=runs/x")[0] == 7
    assert fault(capsys, "train", stack, "run.dir=.")[0] == 2


def test_somebody_elses_folder_is_left_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("notes.txt", ".tmp-draft"):
        (folder / name).write_text("mine")
    code, message = fault(capsys, "train", str(write_stack(tmp_path)), f"run.dir={folder}")
    assert (code, "not empty" in message) == (2, True)
    assert sorted(os.listdir(folder)) == [".tmp-draft", "notes.txt"]


@pytest.mark.parametrize("verb", ["resume", "train"])
def test_a_run_that_another_process_writes_is_left_alone(
    verb: str, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    from vtp_core.run.directory import RunDirectory

    with RunDirectory.open(finished, write=True):
        target = [str(write_stack(tmp_path)), f"run.dir={finished}"] if verb == "train" else [str(finished)]
        code, message = fault(capsys, verb, *target)
    assert (code, "is in use by process" in message) == (2, True)


# ---- encode, decode, weights, eval


def test_files_that_are_no_pictures_or_latents_are_named(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    run_, out = str(finished), str(tmp_path / "z.safetensors")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("x")
    save_file({"latents": torch.zeros(1, 5, 4, 4)}, tmp_path / "five.safetensors")
    save_file({"latents": torch.full((1, 8, 4, 4), float("nan"))}, tmp_path / "nan.safetensors")
    for name, words in (("zero.png", "empty file"), ("absent.png", "No such file")):
        code, message = fault(capsys, "encode", run_, str(tmp_path / name), "-o", out)
        assert (code, words in message) == (4, True)
    for name, words in (("text", "no safetensors"), ("five", "(1, 5, 4, 4)"), ("nan", "not finite")):
        code, message = fault(
            capsys, "decode", run_, str(tmp_path / f"{name}.safetensors"), "-o", str(tmp_path)
        )
        assert (code, words in message) == (4, True)
    Image.new("CMYK", (30, 20)).save(tmp_path / "cmyk.jpg")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):  # a device, too, must not become a file
        assert fault(capsys, "encode", run_, str(tmp_path / "cmyk.jpg"), "-o", str(place))[0] == 7
    assert (tmp_path / "pipe").is_fifo()
    assert fault(capsys, "decode", run_, out, "-o", str(tmp_path / "zero.png"))[0] == 4
    assert run(capsys, "encode", run_, *[str(tmp_path / "cmyk.jpg")] * 70, "-o", out)[0] == 0
    assert load_file(out)["latents"].shape == (70, 8, 4, 4)
    assert fault(capsys, "decode", run_, out, "-o", str(tmp_path / "zero.png"))[0] == 7


def test_weights_that_are_missing_end_with_the_commands(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path / "home"))
    stack = str(write_stack(tmp_path))
    code, message = fault(capsys, "train", stack, *MUTE, "objectives.reconstruction.lpips=1.0")
    assert (code, message.splitlines()[-1].strip()) == (4, "vtp weights import lpips-alex")
    monkeypatch.setattr("vtp_core.weights._packaged", lambda entry: None)
    assert fault(capsys, "weights", "import", "lite0")[0] == 4


def test_eval_prints_json_only_and_says_what_it_lacks(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    code, message = fault(capsys, "eval", str(finished))
    assert (code, "names no probes" in message) == (2, True)
    probes = "probes={rank_me: {limit: 8}, linear: {}}"
    data = ["data.use=image_folder", f"data.root={pictures(tmp_path / 'p')}"]
    code, out, errors = run(capsys, "eval", str(finished), "--json", probes, *data)
    assert code == 0
    assert {row["probe"] for row in json.loads(out)} == {"rank_me/cls", "rank_me/patches", "rank_me/latent"}
    assert errors.splitlines() == ["probes.linear left out: the dataset has no label"]


# ---- resume


def test_a_finished_run_stays_as_it_is(finished: Path, capsys: Capture) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != ".lock"}
    code, out, errors = run(capsys, "resume", str(finished))
    assert (code, "is finished: 2 of 2 steps" in errors, str(finished) in out) == (0, True, True)
    assert before == {p: p.read_bytes() for p in before}


def test_resuming_takes_the_newest_valid_checkpoint_or_begins_again(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    weights = copy / "checkpoints" / "step-00000002" / "tokenizer.safetensors"
    torn = bytearray(weights.read_bytes())
    torn[-9] ^= 1
    weights.write_bytes(torn)
    assert run(capsys, "resume", str(copy))[0] == 0
    assert [row["step"] for row in read(copy / "metrics.jsonl")] == [1, 2]
    checkpoint.verify(weights.parent)

    for path in (copy / "checkpoints").iterdir():
        (path / "manifest.json").write_text("{")
    code, message = fault(capsys, "resume", str(copy))
    assert (code, "no valid checkpoint left" in message) == (4, True)
    shutil.rmtree(copy / "checkpoints")
    assert fault(capsys, "resume", str(copy))[0] == 4  # the end of a finished run is not thrown away

    (copy / "run.json").write_text(json.dumps({**record(copy), "status": "running"}))
    (copy / "stack.yaml").write_text((copy / "stack.yaml").read_text().replace("workers: 0", "workers: 1"))
    code, _, errors = run(capsys, "resume", str(copy))
    assert (code, "was changed since the run began" in errors) == (0, True)
    assert [row["step"] for row in read(copy / "metrics.jsonl")] == [1, 2]


def test_a_learning_rate_that_explodes_is_five_and_says_what_to_change(
    tmp_path: Path, capsys: Capture
) -> None:
    changes = [*MUTE, "train.optim.lr=1e6", "train.max_grad_norm=null", f"run.dir={tmp_path / 'run'}"]
    code, message = fault(capsys, "train", str(write_stack(tmp_path)), *changes, "train.steps=40")
    assert (code, "reconstruction" in message, "stack.yaml" in message) == (5, True, True)
    assert record(tmp_path / "run")["status"] == "failed"
