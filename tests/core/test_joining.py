"""Processes that meet: among the words of the dead, one by one, and with variables that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from crew import free_port
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vtp_core import joining
from vtp_core.errors import StackFault
from vtp_core.joining import Attempt, join
from vtp_core.peers import PeerFault

Launcher = Callable[[str], Attempt]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A launcher's, which outlives the processes."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    for name, value in {"ADDR": "127.0.0.1", "PORT": str(store.port)}.items():
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def met(world: int) -> list[Attempt]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: join(rank, world, 20.0), reversed(range(world))))[::-1]


def test_every_attempt_has_a_name_and_all_processes_the_same(store: TCPStore) -> None:
    attempts = [met(3), met(3), met(2)]
    for number, found in enumerate(attempts):
        assert {(one.name, one.number, one.job) for one in found} == {(found[0].name, number, found[0].job)}
    assert len({found[0].name for found in attempts}) == 3
    assert len({found[0].job for found in attempts}) == 1


def test_what_an_attempt_remembers_the_next_one_learns_on_every_process(store: TCPStore) -> None:
    met(2)[0].remember(0, "runs/first")
    second = met(2)
    assert [one.runs for one in second] == [{"0": "runs/first"}] * 2
    assert [one.made for one in second] == [[], []]  # claimed, but nothing is there
    second[0].remember(1, "runs/second")
    assert met(2)[1].runs == {"0": "runs/first", "1": "runs/second"}


def test_without_a_launcher_the_first_process_keeps_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    first, second = met(2)
    assert first.name == second.name and (first.runs, first.number) == ({}, 0)


def test_the_words_of_the_dead_keep_nobody(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that comes alone finds the names of two that met before, and goes on waiting."""
    met(2)
    monkeypatch.setattr(joining, "ARRIVAL", 1.0)
    for rank, absent in ((0, 1), (1, 0)):
        with pytest.raises(PeerFault, match=f"process {absent} of 2 did not come to 127.0.0.1:{store.port}"):
            join(rank, 2, 1.0)
        assert json.loads(store.get("vtp/attempt"))["number"] == 1  # that of the process 0 that was alone


def test_people_are_told_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the first process is not there: signals are heard, as no turn takes long."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port := str(free_port()))
    monkeypatch.setattr(joining, "ARRIVAL", 1.0)
    monkeypatch.setattr(joining, "SAY", 0.1)
    with pytest.raises(
        PeerFault, match=r"process 0 of 2 did not come to .*refused.*\nstart all processes again"
    ):
        join(1, 2, 0.0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"vtp: waiting for process 0 of 2 at 127.0.0.1:{port} (" in said
    with pytest.raises(PeerFault, match="process 1, 2 of 3 did not come"):
        join(0, 3, 0.0)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("WORLD_SIZE=abc", "WORLD_SIZE='abc'"),
        ("WORLD_SIZE=0", "WORLD_SIZE=0"),
        ("WORLD_SIZE=2 RANK=x", "RANK='x'"),
        ("WORLD_SIZE=2 RANK=5", "RANK=5 .* from 0 to 1"),
        ("WORLD_SIZE=2 RANK=-1", "RANK=-1"),
        ("WORLD_SIZE=1 RANK=3", "RANK=3"),
        ("WORLD_SIZE=2", "RANK is not"),
    ],
)
def test_wrong_variables_are_named(variables: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(StackFault, match=words):
        joining.place()
