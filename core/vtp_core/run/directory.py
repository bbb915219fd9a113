"""A run directory: one place for everything a run leaves, written by one process at a time."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.run import files
from vtp_core.run.environment import capture, masked
from vtp_core.run.lock import Lock

FORMAT = 1
LOCK = ".lock"


class RunDirectory:
    """Paths and records of one run; :meth:`create` and :meth:`open` make it.

    Args:
        path: the directory.
        lock: held by the process that writes; None for readers.
    """

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path | None,
        stack: Mapping[str, Any],
        name: str,
        *,
        seed: int | None = None,
        data: str | None = None,
        when: datetime.datetime | None = None,
        job: str | None = None,
        claimed: Callable[[Path], object] = lambda path: None,
    ) -> Self:
        """Make a run directory, lock it and record stack and environment.

        Args:
            path: ``run.dir``; None takes ``runs/<date>-<stack>-<hash>``.
            stack: the resolved stack; secrets are masked in what is written.
            name: of the stack.
            seed: of the run, for ``environment.json``.
            data: fingerprint of the dataset, for ``environment.json``.
            when: start of the run; now by default.
            job: of the launcher, for the lock; see :class:`~vtp_core.run.lock.Lock`.
            claimed: told of the directory as soon as it is locked, before anything is in it.

        Raises:
            StackFault: the directory has a run in it already, or something else.
            StorageFault: it cannot be written.
        """
        when = when or datetime.datetime.now(datetime.UTC)
        shown = masked(stack)
        digest = _digest(shown)
        run = cls(*_claim(path, f"runs/{when:%Y-%m-%d}-{_slug(name)}-{digest[:8]}", job))
        claimed(run.path)
        try:
            run.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageFault(f"{run.path} cannot be written: {files.reason(error)}") from error
        text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110)
        files.replace(run.path / "stack.yaml", text.encode())
        files.replace_json(run.path / "environment.json", masked(capture(seed, data)))
        # Last: a directory with run.json is a run that can be opened.
        began = when.isoformat(timespec="seconds")
        record = {"format": FORMAT, "name": name, "stack": digest, "started": began}
        files.replace_json(run.path / "run.json", masked({**record, "status": "running"}))
        return run

    @classmethod
    def open(cls, path: Path, *, write: bool = False, job: str | None = None) -> Self:
        """Open a run directory; with ``write`` lock it and remove what a killed process left.

        Raises:
            DataFault: there is no run, or one of a newer format.
            StackFault: another process writes it.
        """
        run = cls(path)
        if (found := run.record().get("format")) != FORMAT:
            raise DataFault(
                f"{path} has format {found!r}; this vtp-plugins reads {FORMAT}\n"
                "upgrade: pip install -U vtp-plugins"
            )
        if write:
            from vtp_core.run import checkpoint  # imports torch, which readers do without

            run._lock = Lock(path / LOCK, job)
            _sweep(path)
            checkpoint.clean(run.checkpoints)
        return run

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def probes(self) -> Path:
        return self.path / "probes.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.record().get("status") == "finished"

    @property
    def changed(self) -> bool:
        """Whether ``stack.yaml`` is not the one that the run began with."""
        return _digest(self.stack()) != self.record().get("stack")

    def holds(self, stack: Mapping[str, Any]) -> bool:
        """Whether ``stack.yaml`` is this stack, its secrets masked; ``run`` may differ."""
        return _digest(masked(stack)) == _digest(self.stack())

    def record(self) -> dict[str, Any]:
        """``run.json``: name, stack hash, start, status and whatever :meth:`mark` added."""
        return self._json("run.json")

    def environment(self) -> dict[str, Any]:
        """``environment.json``."""
        return self._json("environment.json")

    def stack(self) -> dict[str, Any]:
        """``stack.yaml``: the resolved stack, secrets masked."""
        try:
            tree = yaml.safe_load(files.read(self.path / "stack.yaml"))
        except (OSError, yaml.YAMLError) as error:
            raise DataFault(f"{self.path / 'stack.yaml'} cannot be read: {files.reason(error)}") from error
        if not isinstance(tree, dict):
            raise DataFault(f"{self.path / 'stack.yaml'} is not a stack")
        return tree

    def mark(self, status: str, **more: Any) -> None:
        """Record how the run stands: ``running``, ``finished``, ``preempted``, ``failed``; with details.

        A detail that is None is removed.
        """
        record = {**self.record(), "status": status, **more}
        kept = {key: value for key, value in record.items() if value is not None}
        files.replace_json(self.path / "run.json", masked(kept))

    def write(self, name: str, text: str) -> Path:
        """Put a text file into the directory at once: ``plan.txt``, ``report.html``."""
        files.replace(self.path / name, text.encode())
        return self.path / name

    def add(self, name: str, lines: Iterable[str]) -> Path:
        """Put lines into a text file, each once, after those it has."""
        path = self.path / name
        earlier = files.read(path).decode().splitlines() if path.exists() else []
        return self.write(name, "".join(f"{line}\n" for line in dict.fromkeys([*earlier, *lines])))

    def close(self) -> None:
        """Unlock; reading stays possible."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(files.read(path))
        except FileNotFoundError as error:
            raise DataFault(f"{self.path} is no run: it has no {name}; vtp train makes one") from error
        except (OSError, ValueError, RecursionError) as error:
            raise DataFault(f"{path} cannot be read: {files.reason(error)}") from error
        if not isinstance(value, dict):
            raise DataFault(f"{path} is not a record of a run")
        return value


def _claim(path: Path | None, default: str, job: str | None) -> tuple[Path, Lock]:
    """Make and lock a directory that holds nothing yet."""
    try:
        if path is None:
            path = _fresh(Path(default))
        else:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unmakeable(path or default, files.reason(error)) from error
    _refuse_foreign(path)
    lock = Lock(path / LOCK, job)
    try:
        _refuse_occupied(path)
    except StackFault:
        lock.release()
        raise
    _sweep(path)
    return path, lock


def check_free(path: Path) -> None:
    """Refuse early what :meth:`RunDirectory.create` would refuse, as building a run takes seconds.

    Raises:
        StackFault, StorageFault: the directory is in use, or not empty, or cannot be made.
    """
    place = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise _unmakeable(path, "Not a directory" if not place.is_dir() else f"{place} is read-only")
    if path.is_dir():
        _refuse_foreign(path)
        check_idle(path)
        _refuse_occupied(path)


def check_idle(path: Path) -> None:
    """Refuse early a run directory that another process writes.

    Raises:
        StackFault: it does.
    """
    if (path / LOCK).exists():
        Lock(path / LOCK).release()


def _unmakeable(path: Path | str, why: str) -> StorageFault:
    return StorageFault(f"run.dir: {path} cannot be made: {why}\nchoose another place: run.dir=DIR")


def _fresh(path: Path) -> Path:
    """Make ``path``, or ``path-2`` and so on where another run of the day took it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("unreachable: count() does not end")


def _refuse_occupied(path: Path) -> None:
    if (path / "run.json").exists():
        name = shlex.quote(str(path))
        raise StackFault(
            f"run.dir: {path} holds a run already\n"
            f"go on with it: vtp resume {name}; or choose another run.dir, or remove the directory"
        )


def _refuse_foreign(path: Path) -> None:
    """Touch no directory of somebody else's; a creation that was cut off is ours, and so is a whole run."""
    ours = {LOCK, "stack.yaml", "environment.json", "checkpoints", "run.json"}
    names = sorted(entry.name for entry in path.iterdir())
    other = [name for name in names if name not in ours and not name.startswith(files.PARTIAL)]
    if other and "run.json" not in names:
        raise StackFault(f"run.dir: {path} is not empty (it has {other[0]}); choose another run.dir")


def _sweep(path: Path) -> None:
    """Remove half-written files of a process that died."""
    for entry in path.glob(f"{files.PARTIAL}*"):
        if entry.is_symlink() or entry.is_file():
            entry.unlink()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "run"


def _digest(stack: Any) -> str:
    """Identity of a stack, wherever its run is put."""
    tree = {key: value for key, value in dict(stack).items() if key != "run"}
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
