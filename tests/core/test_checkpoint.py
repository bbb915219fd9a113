"""Checkpoints survive kills, full disks and foul play, or say that they did not."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core.errors import StorageFault
from vtp_core.run import checkpoint, manifest


def make(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "encoder": {"weight": torch.randn(32, 16, generator=generator)},
        "optimizer/encoder": {"weight.step": torch.tensor(float(step))},
    }


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    if a.keys() != b.keys() or any(a[part].keys() != b[part].keys() for part in a):
        return False
    return all(
        a[part][name].dtype == b[part][name].dtype and torch.equal(a[part][name], b[part][name])
        for part in a
        for name in a[part]
    )


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parts = {
        "odd": {
            "scalar": torch.tensor(3, dtype=torch.int64),
            "half": torch.randn(5).bfloat16(),
            "double": torch.randn(2, dtype=torch.float64),
            "mask": torch.tensor([True, False]),
            "random": torch.get_rng_state(),
            "across": base.t(),
            "tied": base,
            "tied again": base,
            "slice": base[1:3],
            "none": torch.empty(0, 4),
            "learnt": torch.nn.Parameter(torch.ones(2)),
        },
        "optimizer/encoder": {"a/b.c": torch.ones(1)},
        "empty": {},
    }
    state = {"step": 7, "lr": 1e-3, "names": ["ü", None], "nested": {"deep": [1.5, True]}}
    path = checkpoint.save(tmp_path / "checkpoints", 7, parts, state)
    assert path.name == "step-00000007"
    assert (path / "optimizer.encoder.safetensors").is_file()
    loaded, found = checkpoint.load(path)
    assert same(loaded, {part: {name: t.detach() for name, t in ts.items()} for part, ts in parts.items()})
    assert found == state
    only, _ = checkpoint.load(path, only=["empty"])
    assert only == {"empty": {}}
    with pytest.raises(StorageFault, match="no part 'decoder'; it has"):
        checkpoint.load(path, only=["decoder"])


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    one, two = (checkpoint.save(tmp_path / name, 3, make(3), {"step": 3}) for name in "ab")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    path = checkpoint.save(tmp_path, 1, make(1), {})
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_parts_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rename one"):
        checkpoint.save(tmp_path, 1, {"a/b": {}, "a.b": {}}, {})


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".away"))
    path.symlink_to(path.with_suffix(".away"))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [_flip, _shorten, Path.unlink, _link, _pipe])
@pytest.mark.parametrize("name", ["encoder.safetensors", "state.json", "manifest.json"])
def test_any_harm_is_found_and_the_one_before_is_taken(tmp_path: Path, harm: Any, name: str) -> None:
    older = checkpoint.save(tmp_path, 1, make(1), {})
    path = checkpoint.save(tmp_path, 2, make(2), {"epoch": 3})
    harm(path / name)
    with pytest.raises(StorageFault, match=rf"{name}.*\ngo on from the newest valid checkpoint: vtp resume"):
        checkpoint.load(path)
    notes: list[str] = []
    assert checkpoint.latest(tmp_path, notes.append) == older
    assert len(notes) == 1 and name in notes[0]


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make(1), {})
    body = json.loads((path / "manifest.json").read_text())
    body["files"]["../../secret"] = {**body["files"]["state.json"], "part": "x"}
    body["sha256"] = manifest._digest(body)
    (path / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(StorageFault, match="broken"):
        checkpoint.load(path)


def test_a_newer_format_is_refused_with_the_upgrade(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make(1), {})
    body = json.loads((path / "manifest.json").read_text())
    assert body["format"] == 1  # what one process writes can be read by who knows no shards
    (path / "manifest.json").write_text(json.dumps({**body, "format": 9}))
    with pytest.raises(StorageFault, match=r"format 9.*up to 2\nupgrade: pip install -U vtp-plugins"):
        checkpoint.load(path)
    assert checkpoint.latest(tmp_path, lambda _: None) is None


def test_random_bytes_as_a_manifest_only_ever_raise_our_fault(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, make(1), {})
    good = (path / "manifest.json").read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            bad[draw.randrange(len(bad))] = draw.randrange(256)
        if bytes(bad) != good:
            (path / "manifest.json").write_bytes(bad)
            try:
                checkpoint.load(path)
            except StorageFault:
                continue
            assert json.loads(bad) == json.loads(good)  # the change was in white space


def test_keep_counts_valid_checkpoints_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, make(step), {}, keep=2)
    assert steps(tmp_path) == [2, 3]
    (tmp_path / "step-00000003" / "state.json").unlink()
    checkpoint.save(tmp_path, 4, make(4), {}, keep=2)
    assert steps(tmp_path) == [2, 3, 4]
    checkpoint.save(tmp_path, 5, make(5), {}, keep=1)
    assert steps(tmp_path) == [5]


def test_the_checkpoint_just_saved_stays_whatever_keep_says(tmp_path: Path) -> None:
    for step in (9, 3):
        checkpoint.save(tmp_path, step, make(step), {}, keep=1)
    assert steps(tmp_path) == [3, 9]
    assert checkpoint.cut(tmp_path, 3) == ["step-00000009"]
    assert steps(tmp_path) == [3]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, make(1), {"turn": 1})
    path = checkpoint.save(tmp_path, 1, make(2), {"turn": 2})
    assert checkpoint.load(path)[1] == {"turn": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_clean_removes_leftovers_and_follows_no_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, make(1), {})
    (folder / "step-00000001").rename(folder / ".old-step-00000001")
    (folder / ".tmp-step-00000002-x").mkdir()
    (folder / ".tmp-link").symlink_to(precious)
    (folder / "step-00000009").symlink_to(precious)
    assert checkpoint.clean(folder) == [".tmp-link", ".tmp-step-00000002-x"]
    assert checkpoint.latest(folder) == folder / "step-00000001"
    assert (precious / "file").exists()
    assert checkpoint.clean(tmp_path / "absent") == []


def test_a_linked_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "etc")
    with pytest.raises(StorageFault, match="symlink"):
        checkpoint.save(tmp_path / "checkpoints", 1, make(1), {})
    assert not list((tmp_path / "etc").iterdir())


def test_a_full_disk_is_a_storage_fault_and_older_ones_stay(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, make(1), {}, keep=1)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            StorageFault, match=r"step 2 .*: File too large\n.*are intact; make room, then: vtp resume"
        ):
            checkpoint.save(folder, 2, {"big": {"x": torch.zeros(10_000)}}, {}, keep=1)
        with pytest.raises(StorageFault, match="File too large"):
            checkpoint.save(folder, 2, {}, {"long": "x" * 10_000}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [entry.name for entry in folder.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(folder) == folder / "step-00000001"
    checkpoint.save(folder, 2, make(2), {}, keep=1)
    assert steps(folder) == [2]
    assert StorageFault.code == 7


def test_little_room_is_said_beforehand(tmp_path: Path) -> None:
    assert checkpoint.short_of_room(tmp_path, make(1)) is None
    huge = {"x": {"y": torch.empty(1 << 50, device="meta")}}
    assert "MiB free" in str(checkpoint.short_of_room(tmp_path, huge))


NURSERY = """
import os, signal, sys, time, torch
from pathlib import Path
from vtp_core.run import checkpoint
torch.set_num_threads(1)
parts = {"a": {"x": torch.arange(60_000.0)}, "b/c": {"y": torch.ones(3)}}
calls = 0

def counted(call, fatal):
    def run(*args, **options):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return run

def train(folder, start, fatal):
    for turn in range(1_000_000):  # every step twice, so that replacing is among what dies
        if fatal and turn == 2:
            for name in ("fsync", "rename", "replace", "mkdir", "open", "fchmod", "rmdir", "unlink"):
                setattr(os, name, counted(getattr(os, name), fatal))
        step = start + turn // 2
        checkpoint.save(folder, step, parts, {"step": step}, keep=2)
        if fatal and turn == 6:
            os._exit(min(calls, 255))

for line in sys.stdin:  # folder, first step, call to die at (0: none), seconds to live
    folder, start, fatal, seconds = line.split()
    child = os.fork()
    if not child:
        train(Path(folder), int(start), int(fatal))
    if int(fatal) == 0:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Processes that save until they are killed, forked from one that imported torch once."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, start: int, fatal: int = 0, seconds: float = 0.0) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(folder, start, fatal, seconds, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: fsync matters to power failures, not to kills, and is slow."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    with nursery.process:
        yield nursery


def check_after_kill(folder: Path, at_least: int) -> int:
    """Every visible checkpoint is valid, nothing saved is lost, disk use is bounded, leftovers go."""
    for path in folder.glob("step-*"):
        checkpoint.verify(path)
    assert len(list(folder.iterdir())) <= 4  # keep, one being written, one being removed
    checkpoint.clean(folder)
    found = list(folder.iterdir())
    for path in found:
        assert f"step-{checkpoint.load(path)[1]['step']:08d}" == path.name
    newest = max((int(path.name[5:]) for path in found), default=0)
    assert newest >= at_least
    return newest


def test_sigkill_at_random_moments_leaves_only_valid_checkpoints(memory: Path, nursery: Nursery) -> None:
    draw = random.Random(0)
    newest = 0
    for _ in range(12):
        assert nursery.run(memory, newest + 1, seconds=draw.uniform(0.01, 0.12)) == -signal.SIGKILL
        newest = check_after_kill(memory, newest)
    assert newest > 0


def test_sigkill_at_any_system_call_leaves_only_valid_checkpoints(memory: Path, nursery: Nursery) -> None:
    calls = nursery.run(memory / "whole", 1, fatal=1_000_000)
    assert 60 < calls < 255
    for fatal in range(1, calls + 1, 4):
        folder = memory / str(fatal)
        assert nursery.run(folder, 1, fatal) == -signal.SIGKILL
        check_after_kill(folder, 1)
