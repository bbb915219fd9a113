"""What processes find that are started again by the launcher of those that died."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from crew import HERE, write_stack
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vtp_core import beginning, distributed, load_stack
from vtp_core.errors import StackFault
from vtp_core.stack import load_run_stack
from vtp_core.training import Training
from vtp_plugins.registry import Registry

Attempt = Callable[..., Training]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    """A process that a launcher starts, once more with each call."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.chdir(tmp_path)
    write_stack(tmp_path)

    def started(*changes: str) -> Training:
        monkeypatch.setattr(distributed, "_attempt", None)
        monkeypatch.setattr(beginning, "_RUNS", itertools.count())
        stack = load_stack(
            "slides.yaml", ["train.steps=1", *changes], registry=Registry([HERE / "mishaps.py"])
        )
        return beginning.begin(stack)

    yield started
    del store  # which lives as long as the launcher


@pytest.mark.parametrize(
    "changes", [pytest.param([], marks=pytest.mark.slow), ["run.dir=mine"]], ids=["dated", "given"]
)
def test_a_directory_that_was_only_claimed_is_taken_over(attempt: Attempt, changes: list[str]) -> None:
    """The first process died before a run was in it; that of the next attempt before the run had its names."""
    first = attempt(*changes)
    first.directory.close()
    place = first.directory.path
    for lost in (["run.json", "plan.txt", "plan.json", "names.json"], ["names.json"]):
        for name in lost:
            (place / name).unlink()
        again = attempt(*changes)
        again.directory.close()
        assert (again.directory.path, again.resumed) == (place, "run.json" not in lost)
        assert (place / "run.json").is_file() and (place / "names.json").is_file()
    assert len(list(place.parent.glob("*/run.json"))) == 1


def test_a_stack_with_a_secret_survives_a_restart(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "vit_pixels")
    first = attempt()
    first.directory.close()
    with pytest.raises(StackFault, match="mask"):
        load_run_stack(first.directory.path, first.stack.registry)
    again = attempt()
    assert again.resumed and again.stack.config["decoder"]["use"] == "vit_pixels"
    assert again.run().finished


def test_a_directory_s_own_stack_holds_where_it_is_another(attempt: Attempt) -> None:
    """As of a user who edits the stack while it trains: what was begun goes on as it was."""
    attempt("run.dir=mine").directory.close()
    again = attempt("run.dir=mine", "train.seed=7")
    assert again.resumed and again.stack.train.seed != 7
    again.directory.close()
