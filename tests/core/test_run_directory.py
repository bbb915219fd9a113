"""A run directory has one writer, keeps no secret and says honestly what it is."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.run import environment, lock
from vtp_core.run.directory import RunDirectory

STACK: dict[str, Any] = {"encoder": {"use": "vit", "patch": 8}, "train": {"seed": 0, "betas": (0.9, 0.98)}}
WHEN = datetime.datetime(2026, 11, 23, 15, 0, tzinfo=datetime.UTC)


def test_a_run_is_named_by_date_stack_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunDirectory.create(None, STACK, "vtp tiny", when=WHEN, seed=3, data="abc")
    second = RunDirectory.create(None, {**STACK, "run": {"dir": None}}, "vtp tiny", when=WHEN)
    third = RunDirectory.create(None, {**STACK, "size": "b"}, "../evil", when=WHEN)
    name = first.path.name
    assert first.path.parent == Path("runs") and name.startswith("2026-11-23-vtp-tiny-")
    assert len(name.rpartition("-")[2]) == 8
    assert second.path.name == f"{name}-2"
    assert third.path.parent == Path("runs") and third.path.name.startswith("2026-11-23-evil-")
    assert yaml.safe_load((first.path / "stack.yaml").read_text())["train"]["betas"] == [0.9, 0.98]
    assert first.stack()["encoder"] == STACK["encoder"]
    assert first.environment()["seed"] == 3 and first.environment()["data"] == "abc"
    assert first.checkpoints.is_dir()
    assert sorted(entry.name for entry in first.path.iterdir()) == [
        ".lock", "checkpoints", "environment.json", "run.json", "stack.yaml",
    ]  # fmt: skip


def test_a_status_is_kept_beside_the_start(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", STACK, "x", when=WHEN) as run:
        assert not run.finished
        run.mark("finished", step=10)
        assert run.finished
    record = RunDirectory.open(tmp_path / "run").record()
    assert record["status"] == "finished" and record["step"] == 10 and record["name"] == "x"


def test_an_occupied_directory_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", STACK, "x").close()
    with pytest.raises(StackFault, match=r"holds a run already\n.*vtp resume"):
        RunDirectory.create(tmp_path / "run", STACK, "x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(StackFault, match=r"not empty \(it has thesis.tex\)"):
        RunDirectory.create(tmp_path / "home", STACK, "x")
    (tmp_path / "file").touch()
    with pytest.raises(StorageFault, match="cannot be made: File exists"):
        RunDirectory.create(tmp_path / "file", STACK, "x")


def test_a_creation_that_was_cut_off_can_be_repeated(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run", STACK, "x").close()
    (tmp_path / "run" / "run.json").rename(tmp_path / "run" / ".tmp-run.json-abc")
    with pytest.raises(DataFault, match=r"is no run: it has no run.json"):
        RunDirectory.open(tmp_path / "run")
    RunDirectory.create(tmp_path / "run", STACK, "x").close()
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_what_cannot_be_read_is_a_fault_for_people(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="is no run"):
        RunDirectory.open(tmp_path)
    RunDirectory.create(tmp_path / "run", STACK, "x").close()
    run = RunDirectory.open(tmp_path / "run")
    for text in ("{", "[]", "[" * 100_000):
        (run.path / "environment.json").write_text(text)
        with pytest.raises(DataFault, match=r"environment\.json"):
            run.environment()
    for text in ("a: [", "- 1", "!!python/object/apply:os.getcwd []"):
        (run.path / "stack.yaml").write_text(text)
        with pytest.raises(DataFault, match=r"stack\.yaml"):
            run.stack()
    (run.path / "run.json").write_text('{"format": 7}')
    with pytest.raises(DataFault, match=r"format 7.*\nupgrade: pip"):
        RunDirectory.open(run.path)
    (run.path / "run.json").unlink()
    (run.path / "run.json").symlink_to("/etc/hostname")
    with pytest.raises(DataFault, match="symlink"):
        RunDirectory.open(run.path)


HOLDER = """
import sys, time
from pathlib import Path
from vtp_core.run.lock import Lock
lock = Lock(Path(sys.argv[1]) / ".lock")
print("held", flush=True)
time.sleep(60)
"""
ORPHANS = HOLDER.replace('print("held"', 'import os; os.fork() and print("held"')


def hold(path: Path, code: str = HOLDER) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_refused_at_once_and_a_dead_one_is_succeeded(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, STACK, "x").close()
    with hold(tmp_path) as child:
        began = time.monotonic()
        with pytest.raises(StackFault, match=f"in use by process {child.pid} on ") as fault:
            RunDirectory.open(tmp_path, write=True)
        assert time.monotonic() - began < 2 and fault.value.code == 2
        assert RunDirectory.open(tmp_path).finished is False  # reading needs no lock
        child.kill()
    (tmp_path / "checkpoints" / ".tmp-step-00000001-x").mkdir()
    with RunDirectory.open(tmp_path, write=True):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert not list((tmp_path / "checkpoints").iterdir())
        with pytest.raises(StackFault, match=f"process {os.getpid()}"):
            RunDirectory.open(tmp_path, write=True)
    RunDirectory.open(tmp_path, write=True).close()


def test_workers_that_outlive_their_owner_keep_no_lock(tmp_path: Path) -> None:
    with hold(tmp_path, ORPHANS) as child:
        child.kill()
        child.wait()
        held = lock.Lock(tmp_path / ".lock")
        orphan = next(
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and str(tmp_path) in _command(entry)
        )
        os.kill(orphan, signal.SIGKILL)
        held.release()


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


def test_a_lock_of_another_machine_is_believed_and_one_of_another_boot_is_not(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "b", "started": "1"}))
    with pytest.raises(StackFault, match=r"process 1 on elsewhere\n.*if that process is gone, remove .*lock"):
        lock.Lock(path)
    record = lock._own_record()
    path.write_text(json.dumps({**record, "boot": "an earlier one"}))
    lock.Lock(path).release()
    path.write_text("garbage")
    lock.Lock(path).release()
    assert path.read_text() == ""


def test_a_lock_of_an_earlier_attempt_of_the_same_job_is_taken_over(tmp_path: Path) -> None:
    """Its process may have been on another machine, where nobody can look."""
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "b", "started": "1", "job": "seven"}))
    for job in (None, "eight"):
        with pytest.raises(StackFault, match="process 1 on elsewhere"):
            lock.Lock(path, job)
    lock.Lock(path, "seven").release()


def test_without_locks_of_the_file_system_the_record_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_flock", lambda handle: None)
    with hold(tmp_path) as child:
        with pytest.raises(StackFault, match="in use"):
            lock.Lock(tmp_path / ".lock")
        child.kill()
    lock.Lock(tmp_path / ".lock").release()


def test_a_linked_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(StorageFault, match="symlink"):
        lock.Lock(tmp_path / ".lock")
    assert (tmp_path / "target").read_text() == "precious"


def test_no_secret_gets_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = [f"canary-{index:04}" for index in range(10)]
    monkeypatch.setenv("HF_TOKEN", canaries[0])
    monkeypatch.setenv("HOME_ADDRESS", canaries[1])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", canaries[2])
    stack = {
        **STACK,
        "tokenizer": {"from": "runs/demo"},
        "views": {"tokens": {"use": "plain", "auth_token": canaries[8]}},
        "teachers": {
            "x": {
                "use": "t",
                "api_key": canaries[3],
                "tokens": 256,
                "mask_token": "zero",
                "hf_token": canaries[4],
            }
        },
        "data": {
            "use": "webdataset",
            "urls": [f"https://me:{canaries[5]}@host/a.tar::https://{canaries[9]}@host/{{0..9}}.tar"],
            "index": f"s3://bucket/key?X-Amz-Signature={canaries[6]}&x=1",
            "header": f"Bearer {canaries[0]} {canaries[2]}",
            "credentials": {"user": canaries[7], "list": [canaries[8]], "port": 8080},
            "passwd": 12345678,
        },
    }
    run = RunDirectory.create(tmp_path / "run", stack, f"stack {canaries[0]}")
    run.mark("failed", reason=f"cannot reach https://me:{canaries[5]}@host/a.tar")
    written = [path.read_text() for path in run.path.rglob("*") if path.is_file()]
    assert not [canary for canary in [*canaries, "12345678"] for text in written if canary in text]
    kept = run.stack()
    assert kept["tokenizer"] == {"from": "runs/demo"}
    assert kept["views"]["tokens"]["use"] == "plain"
    assert kept["teachers"]["x"]["tokens"] == 256 and kept["teachers"]["x"]["mask_token"] == "zero"
    assert kept["data"]["urls"] == ["https://***@host/a.tar::https://***@host/{0..9}.tar"]


def test_the_environment_is_an_allow_list() -> None:
    found = environment.capture(seed=1, data="f")
    assert found.keys() == {"seed", "data", "python", "platform", "torch", "packages", "commit"}
    assert found["packages"]["torch"].startswith("2.")
    assert "pytest" not in found["packages"]
    text = json.dumps(found)
    assert str(Path.cwd()) not in text and lock._own_record()["host"] not in text.split('"')


def test_commits_come_from_a_checkout_only(tmp_path: Path) -> None:
    assert environment._commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").touch()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit = environment._commit(tmp_path)
    assert commit is not None and len(commit) == 40
    (tmp_path / "file").write_text("changed")
    assert environment._commit(tmp_path) == f"{commit}-dirty"
