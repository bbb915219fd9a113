"""Artefacts that exist already: of this directory, of other pipelines, and of runs of ``vtp train``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vtp_core.errors import DataFault, Fault, StorageFault
from vtp_core.pipeline import artefacts
from vtp_core.pipeline.directory import Done, PipelineDirectory, records
from vtp_core.pipeline.stages import StackStage, Stage
from vtp_core.run.directory import RunDirectory

Note = Callable[[str], object]


def finished(directory: PipelineDirectory, stage: Stage, key: str, note: Note) -> Done | None:
    """A finished artefact of this key, its bytes compared with its hash.

    Args:
        directory: of the pipeline; what it has comes first.
        stage: wanted.
        key: of the stage.
        note: told about an artefact that is not what it was.
    """
    for found in _candidates(directory, key):
        folder = directory.folder(found)
        try:
            now = stage.artefact(folder) if folder.is_dir() else None
        except (DataFault, StorageFault) as fault:
            note(f"not taken: {str(fault).splitlines()[0]}")
            continue
        if now == found.artefact:
            return found
        what = "is gone" if now is None else "has another hash than when it was finished"
        note(f"not taken: {folder} {what}")
    return _trained(directory, stage, key)


def begun(directory: PipelineDirectory, stage: Stage, key: str, note: Note) -> Done | None:
    """What this directory has begun of a key and can go on with."""
    found = directory.known(key)
    if found is None or found.artefact is not None:
        return None
    folder = directory.folder(found)
    try:
        fits = stage.fits(folder)
    except Fault as fault:
        note(str(fault).splitlines()[0])
        fits = False
    if not fits:
        note(f"{folder} cannot be gone on with; it begins anew")
    return found if fits else None


def _candidates(directory: PipelineDirectory, key: str) -> Iterator[Done]:
    """Finished entries of a key, of this directory first; each folder once."""
    own = directory.known(key)
    seen = set()
    if own is not None and own.artefact is not None:
        seen.add(own.dir)
        yield own
    for root in directory.roots():
        for path, record in records(root):
            for entry in [*record["stages"].values(), *record["earlier"]]:
                if entry["key"] == key and entry["artefact"] is not None:
                    there = PipelineDirectory(path).folder(Done(**entry))
                    found = Done(
                        key, directory.from_here(there), "finished", entry["artefact"], entry["seconds"]
                    )
                    if found.dir not in seen:
                        seen.add(found.dir)
                        yield found


def _trained(directory: PipelineDirectory, stage: Stage, key: str) -> Done | None:
    """A finished run of ``vtp train`` with an equal stack and equal data."""
    if not isinstance(stage, StackStage) or not stage.alone:
        return None
    for root in directory.roots():
        for file in sorted(root.glob("*/run.json"), reverse=True):
            try:
                run = RunDirectory(file.parent)
                if run.finished and stage.made(run) and _key_of(stage, run) == key:
                    return Done(
                        key, directory.from_here(run.path), "finished", stage.artefact(run.path),
                        float(run.record().get("seconds", 0.0)),
                    )  # fmt: skip
            except (DataFault, StorageFault):
                continue  # not this stage's, and nothing hangs on it
    return None


def _key_of(stage: StackStage, run: RunDirectory) -> str:
    """The stage's key over the data that a run was trained on."""
    return artefacts.key_of(stage.identity(), {}, run.environment().get("data"))
