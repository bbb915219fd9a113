"""A pipeline directory: the resolved pipeline, what became of each stage, and the stages' own directories."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.pipeline import FILE, is_pipeline
from vtp_core.pipeline.planning import Pipeline
from vtp_core.run import files
from vtp_core.run.lock import Lock

FORMAT = 1
RECORD = "pipeline.json"
LOCK = ".lock"
ROOT = Path("runs")


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """What became of a stage.

    Attributes:
        key: hash of all that decides its artefact.
        dir: its directory, from the pipeline's.
        status: ``running``, ``finished``, ``preempted`` or ``failed``.
        artefact: content hash of what it left; None before its end.
        seconds: spent on it, over all processes that ended in order.
    """

    key: str
    dir: str
    status: str = "running"
    artefact: str | None = None
    seconds: float = 0.0


class PipelineDirectory:
    """Paths and records of one pipeline; :meth:`claim` and :meth:`open` make it.

    Args:
        path: the directory.
        lock: held by the process that writes; None for readers.
    """

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def claim(cls, pipeline: Pipeline) -> Self:
        """Lock the pipeline's directory and record the pipeline; made if there is none of it yet.

        Without ``run.dir`` an earlier directory of the very pipeline is gone on with, else
        ``runs/<date>-<pipeline>-<hash>`` is made.

        Raises:
            StackFault: another process has it, or it holds something else.
            StorageFault: it cannot be written.
        """
        began = datetime.datetime.now(datetime.UTC)
        path = pipeline.folder or _earlier(pipeline.digest)
        path = path or ROOT / f"{began:%Y-%m-%d}-{pipeline.name}-{pipeline.digest[:8]}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_foreign(path)
        except OSError as error:
            raise StorageFault(f"run.dir: {path} cannot be made: {files.reason(error)}") from error
        directory = cls(path, Lock(path / LOCK))
        try:
            directory._begin(pipeline, began.isoformat(timespec="seconds"))
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def open(cls, path: Path) -> Self:
        """Lock a pipeline directory to go on with it.

        Raises:
            DataFault: there is none, or one of a newer format.
            StackFault: another process has it.
        """
        if not is_pipeline(path):
            raise DataFault(f"{path} is no pipeline directory: it has no {FILE}; vtp run makes one")
        return cls(path, Lock(path / LOCK))

    def _begin(self, pipeline: Pipeline, began: str) -> None:
        """Record the pipeline; what a former one of this directory left stays known."""
        head = {"format": FORMAT, "name": pipeline.name, "pipeline": pipeline.digest}
        record: dict[str, Any] = {"started": began, "stages": {}, "earlier": []}
        if (self.path / RECORD).is_file():
            record |= self.record()
        names = {stage.name for stage in pipeline.stages}
        gone = [entry for name, entry in record["stages"].items() if name not in names]
        kept = {name: entry for name, entry in record["stages"].items() if name in names}
        more = {"version": importlib.metadata.version("vtp-plugins"), "status": "running"}
        for leftover in self.path.glob(f"{files.PARTIAL}*"):
            leftover.unlink()
        self._write(
            {**head, **record, **head, **more, "stages": kept, "earlier": [*record["earlier"], *gone]}
        )
        files.replace(self.path / FILE, pipeline.yaml().encode())  # last: now it can be gone on with

    def record(self) -> dict[str, Any]:
        """``pipeline.json``: name, hash, status and the stages."""
        return read_record(self.path / RECORD)

    def mark(self, status: str) -> None:
        """Record how the pipeline stands."""
        self._write({**self.record(), "status": status})

    # ---- stages

    def stages(self) -> dict[str, Done]:
        """What became of each stage that was begun."""
        return {name: Done(**entry) for name, entry in self.record()["stages"].items()}

    def places(self) -> dict[str, Path]:
        """The directory of each stage that was begun, in order."""
        return {name: self.folder(done) for name, done in self.stages().items()}

    def put(self, stage: str, done: Done) -> None:
        """Record what became of a stage; what another key had left stays known."""
        record = self.record()
        old = record["stages"].get(stage)
        if old is not None and old["key"] != done.key:
            record["earlier"].append(old)
        record["earlier"] = [entry for entry in record["earlier"] if entry["key"] != done.key]
        record["stages"][stage] = dataclasses.asdict(done)
        self._write(record)

    def known(self, key: str) -> Done | None:
        """What this directory has of a key."""
        record = self.record()
        entries = [*record["stages"].values(), *record["earlier"]]
        return next((Done(**entry) for entry in entries if entry["key"] == key), None)

    def folder(self, done: Done) -> Path:
        """A stage's directory."""
        return Path(os.path.normpath(self.path / done.dir))

    def from_here(self, folder: Path) -> str:
        """A directory as :class:`Done` has it: a pipeline and its neighbours may be moved together."""
        return os.path.relpath(folder, self.path)

    def fresh(self, stage: str) -> str:
        """A name for a stage's directory that is not taken."""
        names = (stage if number == 1 else f"{stage}-{number}" for number in range(1, 10_000))
        return next(name for name in names if not (self.path / name).exists())

    def roots(self) -> list[Path]:
        """Where earlier pipelines and runs lie."""
        return list(dict.fromkeys([ROOT.absolute(), self.path.absolute().parent]))

    def _write(self, record: dict[str, Any]) -> None:
        files.replace_json(self.path / RECORD, record)

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


def read_record(path: Path) -> dict[str, Any]:
    """A ``pipeline.json``.

    Raises:
        DataFault: it is missing, broken or of a newer format.
    """
    try:
        record: dict[str, Any] = json.loads(files.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFault(f"{path} cannot be read: {files.reason(error)}") from error
    if not _sound(record):
        raise DataFault(
            f"{path} is no record of format {FORMAT}, which this vtp-plugins reads\n"
            "upgrade: pip install -U vtp-plugins"
        )
    return record


def _sound(record: Any) -> bool:
    """Whether a record is one of ours, with stages as :class:`Done` has them."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return False
    stages, earlier = record.get("stages"), record.get("earlier")
    if not isinstance(stages, dict) or not isinstance(earlier, list):
        return False
    names = {field.name for field in dataclasses.fields(Done)}
    return all(isinstance(entry, dict) and set(entry) == names for entry in [*stages.values(), *earlier])


def records(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Pipeline directories below a root with their records, newest first; broken ones are left out."""
    found = []
    for file in root.glob(f"*/{RECORD}"):
        try:
            found.append((file.parent, read_record(file)))
        except DataFault:
            continue  # somebody else's pipeline: it concerns this one only as a place to find things
    yield from sorted(found, key=lambda pair: (str(pair[1].get("started")), pair[0].name), reverse=True)


def _earlier(digest: str) -> Path | None:
    """The newest directory of the very pipeline."""
    return next((path for path, record in records(ROOT) if record.get("pipeline") == digest), None)


def _refuse_foreign(path: Path) -> None:
    """Touch no directory of somebody else's."""
    names = sorted(entry.name for entry in path.iterdir())
    if FILE in names:
        return
    other = [n for n in names if n not in {LOCK, RECORD} and not n.startswith(files.PARTIAL)]
    if other:
        raise StackFault(f"run.dir: {path} is not empty (it has {other[0]}); choose another run.dir")
