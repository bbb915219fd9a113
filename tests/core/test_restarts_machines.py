"""Launchers on several machines, here on one: each counts restarts for itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from crew import PLUGIN, Launch, free_port, rows, until, write_stack

from vtp_core.run.hashing import state_hash

SHORT = ("train.steps=300", "train.checkpoint_every=20")


def agent(folder: Path, name: str, run: Path, meet: list[str]) -> Launch:
    place = folder / name
    place.mkdir()
    arguments = ["train", write_stack(place), *PLUGIN, *SHORT, f"run.dir={run}"]
    return Launch(place, *arguments, world=1, options=["--max-restarts=3"], meet=meet)


def meeting() -> list[list[str]]:
    """Options of two launchers; the first keeps the store."""
    port = free_port()
    shared = [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id=job{port}",
    ]
    hosts = ["is_host=" + b for b in ("true", "false")]
    return [[*shared, f"--rdzv-conf={conf}"] for conf in hosts]


def undisturbed(folder: Path) -> str:
    run = folder / "whole"
    with Launch(folder, "train", write_stack(folder), *PLUGIN, *SHORT, f"run.dir={run}") as launch:
        assert launch.process.wait(120) == 0
    return state_hash(run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_on_either_machine(tmp_path: Path, victim: int) -> None:
    """The other launcher does not count this as a restart; twice, so that counts are two apart."""
    run, (first, second) = tmp_path / "run", meeting()
    with agent(tmp_path, "one", run, first) as one, agent(tmp_path, "two", run, second) as two:
        for least in (45, 105):
            until(lambda least=least: rows(run) >= least, 100)
            os.kill((one, two)[victim].workers()[0], signal.SIGKILL)
            time.sleep(1)
        assert one.process.wait(120) == 0 and two.process.wait(60) == 0
    assert state_hash(run) == undisturbed(tmp_path)
