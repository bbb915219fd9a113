"""``vtp --help`` and ``vtp list`` answer at once, because they import nothing heavy."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

COMMANDS = pytest.mark.parametrize("command", [["--help"], ["list"]], ids=" ".join)
SECONDS = 0.7


@COMMANDS
def test_torch_is_not_imported(command: list[str]) -> None:
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vtp_core", *command],
        text=True,
        capture_output=True,
        check=True,
    ).stderr
    imported = {
        line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")
    }
    assert "vtp_core.cli" in imported
    assert not {"numpy", "timm", "torch", "torchvision", "PIL"} & imported


@COMMANDS
def test_it_takes_little_time(command: list[str]) -> None:
    # Processor time and the best of several: what the machine does besides is not our cost.
    assert min(_seconds(command) for _ in range(5)) < SECONDS


def _seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "vtp_core", *command], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
