"""TensorBoard shows each step once, through kills and resumes."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtp_core.clock import StepClock
from vtp_core.errors import StackFault
from vtp_core.run.tensorboard import TensorBoard
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec


def train(run: Path | None, steps: range, finish: bool = True) -> None:
    hook, engine = TensorBoard(Spec()), SimpleNamespace(run_path=run)
    for step in steps:
        hook.vtp_step_end(engine, StepClock(), {"step": step, "loss": 1.0 / step, "clip/x": float(step)})
        if step % 2 == 0:
            reading = Reading("reconstruction/psnr", "train", 20.0 + step, 64, "emoji")
            hook.vtp_probe(engine, step, [reading])
    if finish and run is not None:
        hook.vtp_finish(run)
    elif hook._writer is not None:
        hook._writer.flush()  # a killed process writes what it had, and never closes


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_rows_and_readings_are_scalars(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    found = scalars(tmp_path)
    assert found.keys() == {"loss", "clip/x", "probe/train/reconstruction/psnr"}
    assert found["clip/x"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert found["probe/train/reconstruction/psnr"] == [(2, 22.0)]


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    train(tmp_path, range(1, 8), finish=False)
    train(tmp_path, range(5, 9))
    found = scalars(tmp_path)
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    assert [step for step, _ in found["probe/train/reconstruction/psnr"]] == [2, 4, 6, 8]


def test_without_a_run_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(None, range(1, 3))
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_the_stack_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    for name in [n for n in sys.modules if n.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(StackFault, match=r"train.trackers: tensorboard is not installed"):
        TensorBoard(Spec())
