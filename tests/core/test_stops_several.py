"""Several processes that are stopped, or of which one fails, dies or hangs: all end, alike, and say why."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from crew import PLUGIN, Crew, rows, until, write_stack

from vtp_core.run import checkpoint

WITHIN = 20.0  # seconds that all processes have to end


def start(folder: Path, *changes: str, world: int = 2) -> Crew:
    stack = write_stack(folder)
    return Crew(folder, "train", stack, *PLUGIN, f"run.dir={folder / 'run'}", *changes, world=world)


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run" / "run.json").read_text())
    return found


def saved(folder: Path) -> int | None:
    """Step of the newest valid checkpoint."""
    path = checkpoint.latest(folder / "run" / "checkpoints")
    return None if path is None else checkpoint.step_of(path)


def asked(
    folder: Path, number: signal.Signals, rank: int, code: int, after: int = 10, *changes: str
) -> float:
    """Ask one process to stop; seconds until all have ended, as they should."""
    with start(folder, *changes) as crew:
        until(lambda: rows(folder / "run") >= after)
        began = time.monotonic()
        crew.send(rank, number)
        assert crew.codes(WITHIN) == [code, code]
        seconds = time.monotonic() - began
        step = record(folder)["step"]
        for each in range(2):
            assert f"stopped at step {step}; step {step} is saved; continue with: torchrun" in crew.said(each)
            assert "Traceback" not in crew.said(each)
    assert (saved(folder), rows(folder / "run"), record(folder)["status"]) == (step, step, "preempted")
    return seconds


@pytest.mark.parametrize(
    ("number", "rank", "code", "parallel"),
    [
        (signal.SIGTERM, 1, 75, "replicated"),
        (signal.SIGINT, 0, 130, "replicated"),
        (signal.SIGTERM, 0, 75, "fsdp2"),
    ],
)
def test_a_signal_to_one_process_stops_all_at_one_step(
    tmp_path: Path, number: signal.Signals, rank: int, code: int, parallel: str
) -> None:
    asked(tmp_path, number, rank, code, 10, f"train.parallel={parallel}")


def test_what_has_drifted_is_not_saved_when_a_signal_comes(tmp_path: Path) -> None:
    with start(tmp_path, "hooks.mishap={way: drift, at: 3}") as crew:
        until(lambda: rows(tmp_path / "run") >= 5)
        crew.send(0, signal.SIGTERM)
        assert crew.codes(WITHIN) == [75, 75]
        assert "the processes differ in tokenizer/encoder" in crew.said(0)
        assert "no checkpoint was written yet" in crew.said(0)
    assert (saved(tmp_path), record(tmp_path)["status"]) == (None, "failed")


def test_a_step_that_fails_in_one_process_ends_all_with_its_code(tmp_path: Path) -> None:
    with start(tmp_path, "objectives.mishap={way: lookup, at: 3}") as crew:
        assert crew.codes(60) == [3, 3]
        own = "objectives.mishap (the plugin file mishaps.py) failed at step 4: KeyError: 'codebook'"
        assert crew.said(1).startswith(f"vtp: {own}")
        assert f"vtp: process 1 failed: {own}" in crew.said(0)
    assert (saved(tmp_path), rows(tmp_path / "run"), record(tmp_path)["status"]) == (None, 3, "failed")


def test_data_that_one_process_cannot_read_ends_all_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    with start(tmp_path, "data.way=lookup") as crew:  # its 21st sample is of the sixth step
        assert crew.codes(60) == [3, 3]
        assert "process 1 failed: data (the plugin file mishaps.py) failed: KeyError" in crew.said(0)
        for rank in range(2):
            assert (
                "step 5 is saved; continue with: torchrun --nproc-per-node=2 -m vtp_core resume"
                in crew.said(rank)
            )
    assert saved(tmp_path) == 5


def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    with start(tmp_path, "objectives.mishap={way: kill, at: 5}", "train.checkpoint_every=2") as crew:
        assert crew.codes(60) == [75, -signal.SIGKILL]
        said = crew.said(0).splitlines()
        assert "process 1 (" in said[-2] and ") is dead or stopped; it was last seen " in said[-2]
        assert "process 0 is in step 6" in said[-2]
        assert said[-1].startswith(
            "step 4 is saved; continue with: torchrun --nproc-per-node=2 -m vtp_core resume"
        )
    assert "process 1" in str(record(tmp_path)["fault"])


def test_a_process_that_is_stopped_is_named_within_the_time_out(tmp_path: Path) -> None:
    with start(tmp_path, "train.timeout=5") as crew:
        until(lambda: rows(tmp_path / "run") >= 10)
        crew.send(1, signal.SIGSTOP)
        began = time.monotonic()
        assert crew.codes(WITHIN, 0) == [75]
        assert 5 <= time.monotonic() - began < 5 + 10
        assert ") is dead or stopped; it was last seen " in crew.said(0)


def test_a_fault_before_training_ends_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with start(tmp_path) as crew:
        assert crew.codes(60) == [2, 2]
        assert "run.dir" in crew.said(0) and "is not empty (it has mine.txt)" in crew.said(0)
        assert "process 0 failed: run.dir" in crew.said(1)


# ---- what takes longer


@pytest.mark.slow
def test_signals_at_twenty_times(tmp_path: Path) -> None:
    """R14: whenever it comes, to whichever process."""
    draws = random.Random(0)
    longest = 0.0
    for index in range(20):
        folder = tmp_path / str(index)
        folder.mkdir()
        number = draws.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
        changes = ("train.checkpoint_every=7",)
        longest = max(longest, asked(folder, number, draws.randrange(2), 75, draws.randint(1, 300), *changes))
    print(f"all processes ended at most {longest:.2f} s after the signal")


@pytest.mark.slow
def test_a_signal_while_measuring_is_heard_between_two_batches(tmp_path: Path) -> None:
    with start(tmp_path, "probes.mishap={every: 20}") as crew:  # ten seconds of it
        until(lambda: rows(tmp_path / "run") >= 20)
        time.sleep(1.0)
        crew.send(1, signal.SIGTERM)
        assert crew.codes(5) == [75, 75]
    assert saved(tmp_path) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "step"),
    [
        (["objectives.heavy={}", "train.checkpoint_every=20"], 20),
        (["probes.mishap={every: 20, rounds: 2, pause: 15}"], 20),
    ],
    ids=["save", "probe"],
)
def test_what_takes_long_is_finished_after_a_signal(tmp_path: Path, changes: list[str], step: int) -> None:
    """A checkpoint, and what a probe computes on one batch; longer than a step or data may."""
    with start(tmp_path, *changes) as crew:
        until(lambda: rows(tmp_path / "run") >= step)
        time.sleep(1.0)
        for rank in range(2):
            crew.send(rank, signal.SIGTERM)
        assert crew.codes(60) == [75, 75]
        assert f"stopped at step {step}; step {step} is saved" in crew.said(0)
    assert (saved(tmp_path), rows(tmp_path / "run")) == (step, step)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_hangs_in_one_process_does_not_keep_all_from_stopping(tmp_path: Path, workers: int) -> None:
    with start(tmp_path, "data.way=hang", f"data.workers={workers}", "train.checkpoint_every=2") as crew:
        until(lambda: rows(tmp_path / "run") >= 3)
        time.sleep(2)
        began = time.monotonic()
        crew.send(0, signal.SIGTERM)
        assert crew.codes(WITHIN) == [75, 75]
        assert time.monotonic() - began < WITHIN
        for rank in range(2):
            assert ") hangs and the others wait for it; it is waiting for the data of step" in crew.said(rank)
            assert "is saved; continue with: torchrun" in crew.said(rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "doing"),
    [
        (["objectives.mishap={way: hang, at: 3}"], "in step 4"),
        (["data.way=hang"], "waiting for the data of step 6"),
        (["probes.mishap={way: hang, every: 5}"], "measuring after step 5"),
        (["objectives.mishap={way: hang, at: 3}", "train.parallel=fsdp2"], "in step 4"),
    ],
    ids=["step", "data", "probe", "fsdp2"],
)
def test_a_process_that_hangs_is_named_with_what_it_does(
    tmp_path: Path, changes: list[str], doing: str
) -> None:
    with start(tmp_path, "train.timeout=6", *changes) as crew:
        assert crew.codes(60) == [75, 75]
        for rank in range(2):
            who = f"process 1 ({os.uname().nodename}) hangs and the others wait for it; it is {doing} for "
            assert who in crew.said(rank)
            assert re.search(r" s, in mishaps.py line \d+ \(_sleep\)\n", crew.said(rank))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_process_that_keeps_the_store_is_named_too(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, "train.timeout=6") as crew:
        until(lambda: rows(tmp_path / "run") >= 10)
        crew.send(0, number)
        assert crew.codes(WITHIN, 1) == [75]
        assert "process 0, which keeps the store of the run, does not answer" in crew.said(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (["hooks.mishap={way: lookup}"], 3),
        (["probes.mishap={way: lookup, every: 5}"], 3),
        (["objectives.mishap={way: memory, at: 3}"], 6),
    ],
    ids=["hook", "probe", "memory"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_fails_in_one_process_ends_all_with_its_code(
    tmp_path: Path, changes: list[str], code: int, rank: int
) -> None:
    changes = [change.replace("}", f", rank: {rank}}}") for change in changes]
    with start(tmp_path, *changes) as crew:
        assert crew.codes(60) == [code, code]
        assert f"process {rank} failed: " in crew.said(1 - rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_storage_that_is_full_ends_all_after_three_attempts(tmp_path: Path, rank: int) -> None:
    """One process writes the checkpoint, and all stop where it cannot be written again and again."""
    with start(tmp_path, "train.checkpoint_every=50") as crew:
        until(lambda: rows(tmp_path / "run") >= 10)
        folder = tmp_path / "run" / "checkpoints"
        folder.rmdir()
        folder.symlink_to("/nowhere")
        assert crew.codes(60) == [7, 7]
        assert "could not be written" in crew.said(rank)
    assert rows(tmp_path / "run") == 150


@pytest.mark.slow
def test_of_four_processes_the_dead_one_is_named_by_all(tmp_path: Path) -> None:
    with start(tmp_path, "objectives.mishap={way: kill, at: 5, rank: 2}", world=4) as crew:
        assert crew.codes(60) == [75, 75, -signal.SIGKILL, 75]
        for rank in (0, 1, 3):
            assert "process 2 (" in crew.said(rank)


@pytest.mark.slow
def test_a_process_that_never_comes_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(tmp_path, world=3) as crew:
        crew.send(2, signal.SIGKILL)
        time.sleep(8)
        crew.send(0, signal.SIGTERM)  # waiting for the others is heard in
        assert crew.codes(10, 0) == [75]
