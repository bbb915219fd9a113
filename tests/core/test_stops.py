"""Runs that are stopped: by a signal, twice, while they measure, while data hangs; and workers that die."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from small import run, write_stack

from vtp_core import load_stack, train
from vtp_core.errors import DataFault
from vtp_core.run import checkpoint
from vtp_core.run.metrics import read
from vtp_core.stopping import SIGNALS, Interrupted, handled, interrupt
from vtp_core.training import Training

Capture = pytest.CaptureFixture[str]
PLUGIN = ["--plugin", str(Path(__file__).parent / "faulty.py")]
MUTE = [f"objectives.{name}=null" for name in ("clip", "dino", "ibot", "koleo")]


def rows(path: Path) -> list[tuple[object, object]]:
    return [(row["step"], row["loss"]) for row in read(path / "metrics.jsonl")]


def saved(path: Path) -> list[str]:
    return sorted(entry.name for entry in (path / "checkpoints").iterdir())


def start(capsys: Capture, folder: Path, *changes: str) -> tuple[int, str]:
    """Train and tell code and message."""
    base = [*PLUGIN, *MUTE, "train.steps=4", "train.checkpoint_every=4", f"run.dir={folder / 'run'}"]
    code, _, errors = run(capsys, "train", str(write_stack(folder)), *base, *changes)
    assert "Traceback" not in errors
    return code, errors


@pytest.mark.parametrize(("way", "code"), [("stop", 75), ("interrupt", 130)])
def test_a_signal_lets_the_step_end_and_saves(way: str, code: int, tmp_path: Path, capsys: Capture) -> None:
    hooks = f"hooks={{hook: {{event: step, way: {way}}}}}"
    ended, errors = start(capsys, tmp_path, hooks)
    assert (ended, "stopped at step 2; step 2 is saved; continue with: vtp resume" in errors) == (code, True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "preempted"
    assert saved(tmp_path / "run") == ["step-00000002"]
    stack = load_stack(tmp_path / "run" / "stack.yaml", ["hooks=null", f"run.dir={tmp_path / 'whole'}"])
    train(stack)
    train(stack, resume=tmp_path / "run")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_second_signal_ends_at_once(tmp_path: Path, capsys: Capture) -> None:
    ended, errors = start(capsys, tmp_path, "objectives.fails={way: twice, at: 1}")
    assert (ended, "no checkpoint was written yet; begin it again" in errors) == (75, True)
    assert saved(tmp_path / "run") == []
    assert [step for step, _ in rows(tmp_path / "run")] == [1]


def test_a_signal_while_measuring_saves_and_the_measurement_comes_on_resuming(
    tmp_path: Path, capsys: Capture
) -> None:
    probes = "probes={failing: {way: stop, every: 2}, rank_me: {limit: 8, every: 2}}"
    ended, errors = start(capsys, tmp_path, probes)
    assert (ended, "stopped at step 2; step 2 is saved" in errors) == (75, True)
    stack = load_stack(tmp_path / "run" / "stack.yaml", ["~probes.failing"])
    train(stack, resume=tmp_path / "run")
    steps = [row["step"] for row in read(tmp_path / "run" / "probes.jsonl") if row["probe"] == "rank_me/cls"]
    assert steps == [2, 4]


def test_a_signal_in_the_last_measurement_loses_no_step_and_doubles_no_row(
    tmp_path: Path, capsys: Capture
) -> None:
    probes = "probes={rank_me: {limit: 8}, failing: {way: stop}}"
    ended, _ = start(capsys, tmp_path, probes)
    assert (ended, saved(tmp_path / "run")) == (75, ["step-00000004"])
    train(load_stack(tmp_path / "run" / "stack.yaml", ["~probes.failing"]), resume=tmp_path / "run")
    probed = [row["probe"] for row in read(tmp_path / "run" / "probes.jsonl")]
    assert sorted(probed) == ["rank_me/cls", "rank_me/latent", "rank_me/patches"]
    assert [step for step, _ in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_signal_before_training_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nPLUGINS = {}\n")
    code, _, errors = run(capsys, "train", str(write_stack(tmp_path)), "--plugin", str(plugin))
    assert (code, errors) == (75, "vtp: ended by SIGTERM\n")


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with handled(interrupt):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(Interrupted) as ended:
                signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 130
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert before == {number: signal.getsignal(number) for number in SIGNALS}


def test_a_worker_that_dies_ends_the_run_between_two_steps(tmp_path: Path, capsys: Capture) -> None:
    ended, errors = start(
        capsys, tmp_path, "data.use=faulty", "data.way=die", "data.workers=1", "train.steps=12"
    )
    assert ended == 4
    assert "a worker died before step " in errors
    assert "it was killed by SIGKILL" in errors, errors
    assert "is saved; continue with" in errors
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is not None


def test_data_that_hangs_does_not_keep_a_run_from_stopping(tmp_path: Path, capsys: Capture) -> None:
    began = time.monotonic()

    def stop() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() - began < 10:
            time.sleep(0.02)
        time.sleep(0.5)
        signal.pthread_kill(main, signal.SIGTERM)

    main = threading.get_ident()
    thread = threading.Thread(target=stop)
    with handled(lambda number: None):  # a signal that comes too late must not end the tests
        thread.start()
        ended, errors = start(
            capsys, tmp_path, "data.use=faulty", "data.way=hang", "data.workers=1", "train.steps=12"
        )
        thread.join()
    assert (ended, "is saved; continue with" in errors) == (75, True)
    assert time.monotonic() - began < 20


def test_a_run_that_cannot_begin_gives_its_directory_back(tmp_path: Path) -> None:
    stack = load_stack(write_stack(tmp_path), [*MUTE, "train.steps=1", f"run.dir={tmp_path / 'run'}"])
    path = train(stack).path
    state = path / "checkpoints" / "step-00000001" / "manifest.json"
    kept = state.read_text()
    state.write_text("{")
    with pytest.raises(DataFault, match="no valid checkpoint left"):
        Training(stack, resume=path)
    state.write_text(kept)
    assert train(stack, resume=path).finished
