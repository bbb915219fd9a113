"""torchrun: a signal to the launcher, processes that it starts again, and a launcher that dies."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from crew import PLUGIN, Launch, rows, until, write_stack

from vtp_core.run import checkpoint
from vtp_core.run.hashing import state_hash

SHORT = ("train.steps=60", "train.checkpoint_every=5")


def start(folder: Path, *changes: str, restarts: int = 0, world: int = 2) -> Launch:
    stack = write_stack(folder)
    options = [f"--max-restarts={restarts}"] if restarts else []
    return Launch(folder, "train", stack, *PLUGIN, *SHORT, *changes, world=world, options=options)


def resumptions(run: Path) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads((run / "run.json").read_text()).get("resumed", [])
    return found


def test_processes_that_torchrun_starts_again_finish_the_run(tmp_path: Path) -> None:
    """One dies in step 24: those that follow find the run without being told where it is."""
    with start(tmp_path, "objectives.mishap={way: kill once, at: 23}", restarts=1) as launch:
        assert launch.process.wait(120) == 0
    (run,) = (tmp_path / "runs").iterdir()
    (entry,) = resumptions(run)
    assert (entry["step"], entry["restart"], entry["processes"]) == (20, 1, 2)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert "process 1 (" in launch.said()
    assert rows(run) == 60


def test_a_signal_to_the_launcher_stops_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(tmp_path, "train.steps=2000", f"run.dir={run}") as launch:
        until(lambda: rows(run) >= 7)
        began = time.monotonic()
        launch.process.send_signal(signal.SIGTERM)
        assert launch.process.wait(20) == 1  # torchrun's own code, whatever its processes end with
        assert time.monotonic() - began < 20
        assert launch.workers() == []
    step = json.loads((run / "run.json").read_text())["step"]
    assert f"stopped at step {step}; step {step} is saved" in launch.said()
    found = checkpoint.latest(run / "checkpoints")
    assert found is not None and checkpoint.step_of(found) == step


@pytest.mark.slow
def test_killed_ten_times_a_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """R15: ten runs, each loses a random process at a random step; every one ends with the undisturbed hash."""
    whole = tmp_path / "whole"
    with start(tmp_path, f"run.dir={whole}") as launch:
        assert launch.process.wait(120) == 0
    draws, longest = random.Random(0), 0.0
    for index in range(10):
        run = tmp_path / f"run-{index}"
        with start(tmp_path, f"run.dir={run}", restarts=3) as launch:
            step = draws.randint(1, 40)
            until(lambda run=run, step=step: rows(run) >= step)
            began = time.monotonic()
            os.kill(draws.choice(launch.workers()), signal.SIGKILL)
            until(lambda run=run: resumptions(run), 60)
            longest = max(longest, time.monotonic() - began)
            assert launch.process.wait(120) == 0, index
        assert state_hash(run) == state_hash(whole), index
    print(f"a run went on at most {longest:.1f} s after a process was killed")


@pytest.mark.slow
def test_a_signal_to_one_process_lets_torchrun_start_all_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start(tmp_path, "train.steps=400", f"run.dir={run}", restarts=1) as launch:
        until(lambda: rows(run) >= 7)
        os.kill(launch.workers()[1], signal.SIGTERM)
        assert launch.process.wait(120) == 0
    assert [entry["restart"] for entry in resumptions(run)] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_processes_whose_launcher_dies_save_and_end(tmp_path: Path, number: signal.Signals) -> None:
    """torchrun forwards neither."""
    run = tmp_path / "run"
    with start(tmp_path, "train.steps=20000", f"run.dir={run}") as launch:
        until(lambda: rows(run) >= 7)
        launch.process.send_signal(number)
        launch.process.wait(20)
        until(lambda: not launch.workers(), 20)
    assert json.loads((run / "run.json").read_text())["status"] == "preempted"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_torchrun_resumes_on_another_number_of_processes(tmp_path: Path, world: int) -> None:
    run = tmp_path / "run"
    with start(tmp_path, f"run.dir={run}", "train.steps=400") as launch:
        until(lambda: rows(run) >= 7)
        launch.process.send_signal(signal.SIGTERM)
        launch.process.wait(20)
    with Launch(tmp_path, "resume", str(run), *PLUGIN, world=world) as launch:
        assert launch.process.wait(120) == 0
    assert [entry["processes"] for entry in resumptions(run)] == [world]
    assert rows(run) == 400


@pytest.mark.slow
def test_a_stopped_process_does_not_outlive_torchrun(tmp_path: Path) -> None:
    """R16: the others end within the time-out, torchrun kills the stopped one, and nobody is left."""
    run = tmp_path / "run"
    with start(tmp_path, f"run.dir={run}", "train.steps=20000", "train.timeout=6") as launch:
        until(lambda: rows(run) >= 7)
        os.kill(launch.workers()[1], signal.SIGSTOP)
        began = time.monotonic()
        until(lambda: len(launch.workers()) == 1, 20)
        assert time.monotonic() - began < 6 + 10
        assert launch.process.wait(60) == 1
        assert launch.workers() == []
    assert ") is dead or stopped; it was last seen " in launch.said()
