"""A pipeline from its first stage to its last: what is finished is found, what was begun is gone on with."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vtp_core.attribution import translated
from vtp_core.errors import Fault, NonFinite, StackFault
from vtp_core.pipeline import FILE, artefacts, finding
from vtp_core.pipeline.directory import Done, PipelineDirectory
from vtp_core.pipeline.planning import Pipeline, load_pipeline
from vtp_core.pipeline.stages import Stage
from vtp_core.stopping import Interrupted, Preempted, handled, interrupt
from vtp_plugins.registry import Registry

Note = Callable[[str], object]


def run_pipeline(
    source: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None, note: Note = print
) -> PipelineDirectory:
    """Run the stages of a pipeline that are not finished.

    Args:
        source: a shipped name, a YAML file or a pipeline directory.
        overrides: ``stage.key=value`` for a stage's stack, ``run.dir=DIR`` for the pipeline.
        registry: what is installed; made afresh by default.
        note: told one line for each stage, and for each artefact that is not what it was.

    Returns:
        The directory, with what became of each stage.

    Raises:
        StackFault: anything in any stage's stack, before a stage runs.
        Preempted: a signal came; the pipeline can be continued.
        Fault: of a stage, as :func:`vtp_core.train` raises it.
    """
    _refuse_processes()
    pipeline = load_pipeline(source, overrides, registry)
    return _Running(pipeline, PipelineDirectory.claim(pipeline), note).run()


def resume_pipeline(path: Path, registry: Registry | None = None, note: Note = print) -> PipelineDirectory:
    """Go on with a pipeline, in the middle of a stage if it was stopped there; see :func:`run_pipeline`.

    Raises:
        DataFault: there is no pipeline.
    """
    _refuse_processes()
    with PipelineDirectory.open(path):  # early, as loading takes seconds
        if "***" in (path / FILE).read_text(encoding="utf-8"):
            raise StackFault(
                f"{path / FILE} has a masked secret (***); go on with the pipeline that it was made of: "
                f"vtp run PIPELINE run.dir={shlex.quote(str(path))}"
            )
        pipeline = load_pipeline(path, (), registry)
    pipeline = dataclasses.replace(pipeline, folder=path)
    return _Running(pipeline, PipelineDirectory.claim(pipeline), note).run()


def _refuse_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StackFault("a pipeline is run by one process; train its stages one by one with torchrun")


class _Running:
    """One pipeline in progress.

    Args:
        pipeline: checked.
        directory: locked.
        note: told what happens.
    """

    def __init__(self, pipeline: Pipeline, directory: PipelineDirectory, note: Note) -> None:
        self.pipeline, self.directory, self.note = pipeline, directory, note
        self.places: dict[str, Path] = {}
        self.hashes: dict[str, str] = {}

    def run(self) -> PipelineDirectory:
        with self.directory:
            for number, stage in enumerate(self.pipeline.stages, 1):
                self._guarded(stage, f"stage {number}/{len(self.pipeline.stages)} {stage.name}")
            self.directory.mark("finished")
        return self.directory

    def _guarded(self, stage: Stage, header: str) -> None:
        """One stage; whatever ends it early is recorded, and told with how to go on."""
        began = time.perf_counter()
        try:
            with handled(interrupt):
                self._stage(stage, header, began)
        except Interrupted as stop:
            self._stopped(stage, "preempted", began)
            raise Preempted(f"stage {stage.name}: {stop}; {self._way_on()}", stop.code) from None
        except Preempted as stop:
            self._stopped(stage, "preempted", began)
            raise Preempted(f"stage {stage.name}: {self._here(str(stop), stage)}", stop.code) from None
        except Exception as error:
            self._stopped(stage, "failed", began)
            fault = translated(error)
            if fault is None:
                raise
            raise self._explained(fault, stage) from error

    def _stage(self, stage: Stage, header: str, began: float) -> None:
        """Find the stage's artefact, or make it."""
        key = self._key(stage)
        found = finding.finished(self.directory, stage, key, self._aside(stage))
        if found is not None:
            folder = self.directory.folder(found)
            self.note(f"{header}: skipped: finished, hash {str(found.artefact)[:8]}, {folder}")
        else:
            found = self._made(stage, header, key, began)
        self.directory.put(stage.name, found)
        self.places[stage.name] = self.directory.folder(found)
        self.hashes[stage.name] = str(found.artefact)

    def _aside(self, stage: Stage) -> Note:
        return lambda line: self.note(f"stage {stage.name}: {line}")

    def _key(self, stage: Stage) -> str:
        upstream = {role: self.hashes[name] for role, name in stage.reads.items()}
        return artefacts.key_of(
            stage.identity(), {**stage.outside(), **upstream}, stage.fingerprint(self.places)
        )

    def _made(self, stage: Stage, header: str, key: str, began: float) -> Done:
        """Work on a stage to its end, in the directory where it was begun."""
        done = finding.begun(self.directory, stage, key, self._aside(stage))
        again = done is not None
        done = done or Done(key, self.directory.fresh(stage.name))
        folder = self.directory.folder(done)
        self.directory.put(stage.name, dataclasses.replace(done, status="running", artefact=None))
        self.note(f"{header}: {stage.title}{', resumed' if again else ''}, {folder}")
        stage.work(folder, self.places, self.note)
        seconds = round(done.seconds + time.perf_counter() - began, 1)
        return dataclasses.replace(done, status="finished", artefact=stage.artefact(folder), seconds=seconds)

    # ---- how a pipeline ends before its time

    def _stopped(self, stage: Stage, status: str, began: float) -> None:
        """Record how stage and pipeline stand, as far as the disk lets us."""
        try:
            done = self.directory.stages().get(stage.name)
            if done is not None and done.status == "running":
                seconds = round(done.seconds + time.perf_counter() - began, 1)
                self.directory.put(stage.name, dataclasses.replace(done, status=status, seconds=seconds))
            self.directory.mark(status)
        except Fault:
            return  # the pipeline ends anyway, for a reason that matters more

    def _explained(self, fault: Fault, stage: Stage) -> Fault:
        """A stage's fault with how to go on with the pipeline, in place of how to go on with the stage's run."""
        fault.args = (f"stage {stage.name}: {self._here(str(fault), stage)}", *fault.args[1:])
        fault.__notes__ = []
        if isinstance(fault, NonFinite):
            run = shlex.quote(str(self.directory.path))
            fault.add_note(
                "as it is, a resumed pipeline would repeat it; change the stage: "
                f"vtp run {run} run.dir={run} {stage.name}.key=value"
            )
        elif self._way_on() not in str(fault):
            fault.add_note(self._way_on())
        return fault

    def _way_on(self) -> str:
        return f"continue with: {self._resume()}"

    def _resume(self) -> str:
        path = str(self.directory.path)
        files = [word for file in self.pipeline.registry.files for word in ("--plugin", str(file))]
        return shlex.join(["vtp", "resume", path, *files])

    def _here(self, text: str, stage: Stage) -> str:
        """A message that says how to resume a stage's run, turned to the pipeline."""
        done = self.directory.stages().get(stage.name)
        if done is None:
            return text
        folder = shlex.quote(str(self.directory.folder(done)))
        return text.replace(f"vtp resume {folder}", f"vtp resume {shlex.quote(str(self.directory.path))}")
