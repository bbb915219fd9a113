"""Last words: in full once a machine, and where torchrun looks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from vtp_core import farewell
from vtp_core.errors import DataFault
from vtp_core.peers import PeerFault, Verdict


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the second process of torchrun's on the second machine."""
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)


def noted(fault: Exception) -> Exception:
    fault.add_note("step 4 is saved")
    return fault


def test_one_process_speaks_in_full() -> None:
    assert farewell.words(noted(DataFault("torn")), "", "bye") == "torn\nstep 4 is saved\nbye"
    assert farewell.words(noted(PeerFault("torn", 4, known=True))) == "torn\nstep 4 is saved"


@pytest.mark.usefixtures("third")
def test_under_torchrun_others_say_in_a_line_what_another_says_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verdict = Verdict(1, "torn " * 50 + "\nand more", 4, own=True)
    short = farewell.words(noted(verdict.for_peer(3)), "bye")
    assert short.startswith("process 3 ends too: process 1 failed: torn torn") and short.endswith("...")
    assert len(short) < 240 and "\n" not in short
    monkeypatch.setenv("LOCAL_RANK", "0")  # the machine's own output has it too
    assert farewell.words(verdict.for_peer(3)).endswith("and more")


@pytest.mark.usefixtures("third")
def test_who_failed_or_found_out_speaks_in_full() -> None:
    assert farewell.words(noted(DataFault("torn"))) == "torn\nstep 4 is saved"
    found = Verdict(3, "process 0 is dead", 75, own=False)
    assert farewell.words(noted(found.for_peer(3))) == "process 0 is dead\nstep 4 is saved"
    assert farewell.words(found.for_peer(2)) == "process 3 ends too: process 0 is dead"


def test_torchrun_shows_the_cause_at_the_end_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {}
    for rank, fault in enumerate([PeerFault("process 1 failed: torn", 4, known=True), DataFault("torn")]):
        path = tmp_path / f"{rank}.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
        farewell.leave(f"vtp: {fault}\nstep 4 is saved", fault)
        assert "torn" in json.loads(path.read_text())["message"]["message"]
        failures[rank] = ProcessFailure(rank, 1, 4, str(path))
    page = str(ChildFailedError("vtp_core", failures))
    cause = page.partition("Root Cause")[2]
    assert "traceback : vtp: torn\n  step 4 is saved" in cause and "process 1 failed" not in cause


def test_without_torchrun_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    farewell.leave("bye")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    farewell.leave("bye")
    assert list(tmp_path.iterdir()) == []
