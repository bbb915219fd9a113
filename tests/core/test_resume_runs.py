"""Whole runs that are cut off and resumed, in one process and in two: bit by bit the undisturbed run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool
from recipe import killed, resumed, trained
from torch import Tensor

from vtp_core.errors import NonFinite
from vtp_core.run import checkpoint
from vtp_core.run.hashing import state_hash

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run of one process."""
    return trained(str(tmp_path_factory.mktemp("alone")), "whole")


@pytest.fixture(scope="module")
def together(two: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The undisturbed run of two."""
    first, second = two("recipe.trained", str(tmp_path_factory.mktemp("together")), "whole")
    assert first == second
    return first


def again(whole: dict[str, Any], step: int, name: str, how: Run = resumed) -> dict[str, Any]:
    """The same run, killed after the checkpoint of a step, and resumed."""
    return how(str(killed(Path(whole["run"]), step, name)))


def test_one_process_goes_on_where_an_epoch_ends(alone: dict[str, Any]) -> None:
    found = again(alone, 5, "epoch")  # 5 steps of 16 rows are two epochs of 40 samples
    assert found["stream"] == alone["stream"]
    assert found["hash"] == alone["hash"]


@pytest.mark.parametrize("step", [3, 6])  # the critic learns; the decoder is paid for deceiving it
def test_two_processes_go_on_as_if_nothing_had_been(two: Pool, together: dict[str, Any], step: int) -> None:
    found = again(together, step, f"from-{step}", lambda run: two("recipe.resumed", run)[0])
    assert found["stream"] == together["stream"]
    assert found["hash"] == together["hash"]


def test_another_number_of_processes_goes_on(
    two: Pool, alone: dict[str, Any], together: dict[str, Any]
) -> None:
    """Sums are taken in another order, so the last digits differ, and nothing else."""
    pair = again(alone, 5, "by-two", lambda run: two("recipe.resumed", run)[0])
    single = again(together, 5, "by-one")
    for found, whole in ((pair, alone), (single, together)):
        for ours, theirs in zip(
            map(json.loads, found["stream"]), map(json.loads, whole["stream"]), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-6)
    record = json.loads(Path(pair["run"], "run.json").read_text())
    assert [(entry["step"], entry["processes"]) for entry in record["resumed"]] == [(5, 2)]


GROUPS = {
    "model": ("tokenizer", ""),
    "decoder": ("tokenizer", "decoder."),
    "generator": ("generator", ""),
    "average of the generator": ("generator.ema", ""),
    "teacher": ("teacher", ""),
    "centre of DINO": ("objectives/dino", "centering.centre"),
    "centre of iBOT": ("objectives/ibot", "centering.centre"),
    "temperature of CLIP": ("objectives/clip", "logit_scale"),
    "optimizer": ("optimizer", ""),
    "optimizer of the generator": ("optimizer", "adamw/generator."),
    "critic": ("objectives/gan", "critic."),
    "statistics of the critic's norms": ("objectives/gan", "critic.main.3.running_mean"),
    "moving means of LeCam": ("objectives/gan", "anchors"),
    "optimizer of the critic": ("optimizer/gan", ""),
}


def changed(run: Path, step: int, part: str, prefix: str) -> None:
    """Write a checkpoint anew with some of its tensors moved; with an empty part as it is."""
    parts, state = checkpoint.load(run / "checkpoints" / f"step-{step:08d}")
    chosen = [key for key in parts.get(part, ()) if key.startswith(prefix)]
    assert bool(chosen) == bool(part), "nothing to change"
    parts[part] = {k: moved(v) if k in chosen else v for k, v in parts[part].items()} if part else {}
    checkpoint.save(run / "checkpoints", step, {k: v for k, v in parts.items() if k}, state)


def moved(value: Tensor) -> Tensor:
    return value * 0.5 + 0.01 if value.is_floating_point() else value + 1


def differs(whole: dict[str, Any], run: Path) -> bool:
    """Whether the check that resumed runs pass sees a difference."""
    try:
        found = resumed(str(run))
    except NonFinite:
        return True
    return found["hash"] != whole["hash"] or found["stream"] != whole["stream"]


def test_every_group_of_the_state_counts(alone: dict[str, Any]) -> None:
    """What a checkpoint holds, moved a little, one group after the other: the equality above fails for each."""
    run = Path(alone["run"])
    same = killed(run, 7, "same")
    changed(same, 7, "", "")
    assert not differs(alone, same)
    unseen = []
    for name, (part, prefix) in GROUPS.items():
        other = killed(run, 7, name)
        changed(other, 7, part, prefix)
        if not differs(alone, other):
            unseen.append(name)
    assert unseen == []


def test_the_step_counts(alone: dict[str, Any]) -> None:
    """The position in the data, every draw, schedules and the averages' ages hang on it."""
    run = killed(Path(alone["run"]), 7, "earlier")
    (run / "checkpoints" / "step-00000007").rename(run / "checkpoints" / "step-00000006")
    assert differs(alone, run)


def test_a_hash_tells_checkpoints_apart(alone: dict[str, Any]) -> None:
    steps = Path(alone["run"], "checkpoints")
    hashes = {step: state_hash(steps / f"step-{step:08d}") for step in (1, 7, 8)}
    assert len(set(hashes.values())) == 3
    assert hashes[8] == alone["hash"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [(), ("train.precision=bfloat16", "data.workers=4")], ids=["float32", "bfloat16"]
)
def test_fifty_points(two: Pool, tmp_path: Path, changes: tuple[str, ...]) -> None:
    """R1: 25 random points of a run of 30 steps in one process, and 25 in two."""
    changes = (*changes, "train.steps=30", "objectives.gan.start=12", "objectives.gan.critic.start=8")
    ways: dict[str, tuple[Run, Run]] = {
        "one": (trained, resumed),
        "two": (lambda *a: two("recipe.trained", *a)[0], lambda *a: two("recipe.resumed", *a)[0]),
    }
    for name, (train, resume) in ways.items():
        folder = tmp_path / name
        folder.mkdir()
        whole = train(str(folder), "whole", *changes)
        for step in random.Random(0).sample(range(1, 30), 25):
            found = again(whole, step, f"from-{step}", resume)
            assert found["stream"] == whole["stream"], (name, step)
            assert found["hash"] == whole["hash"], (name, step)


def test_draws_of_torch_are_no_part_of_the_state(alone: dict[str, Any]) -> None:
    """Nobody uses torch's global generator, so a resumed run needs none of its state."""
    torch.manual_seed(12345)
    torch.rand(7)
    assert again(alone, 6, "reseeded")["hash"] == alone["hash"]
