"""A run from its stack to its report: data, engine, checkpoints, probes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vtp_core import adopting, agreement, distributed, evaluation, options, recording
from vtp_core.announcing import announced
from vtp_core.build import blueprint, build, spec_of
from vtp_core.data.steps import Batch
from vtp_core.devices import device_of
from vtp_core.ending import Ending
from vtp_core.engine import Engine
from vtp_core.errors import DataFault
from vtp_core.exporters import travelled_exporters
from vtp_core.fields import check_fields, loader_of
from vtp_core.forwards import Inputs
from vtp_core.heartbeat import Heart
from vtp_core.hooks import build_hooks
from vtp_core.measuring import Measuring
from vtp_core.rows import check_rows
from vtp_core.run import checkpoint
from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import JsonLines
from vtp_core.run.progress import Progress
from vtp_core.saving import Saver
from vtp_core.stack import Stack
from vtp_core.stopping import Interrupted, Stopping, handled
from vtp_core.together import Together
from vtp_core.trial import check_sampler


class Training:
    """One run in progress; every attribute is built in the constructor, nothing runs there.

    Args:
        stack: what to train.
        resume: a run directory of this very stack.
        made: told of the run's directory as soon as it is claimed.
        place: directory that an earlier attempt claimed for this run and died.
    """

    def __init__(
        self,
        stack: Stack,
        resume: Path | None = None,
        made: Callable[[Path], object] = lambda path: None,
        place: Path | None = None,
    ) -> None:
        self.began, self.made, self.place = time.perf_counter(), made, place
        self.keys = stack.train
        self.device = device_of(self.keys.device)
        distributed.start(self.device, self.keys.timeout)
        self.heart = Heart(self.keys.timeout, slack=0.0 if self.device.type == "cuda" else 5.0)
        with self.heart.guarding():
            self._build(stack if resume else adopting.settled(stack), resume)

    def _build(self, stack: Stack, resume: Path | None) -> None:
        self.stack = stack
        plans = blueprint(stack)
        check_rows(stack, distributed.world_size())
        self.source, self.carried = adopting.beginning(stack, resume)
        probes = evaluation.probe_components(stack)
        self.make_dataset = evaluation.dataset_factory(stack, spec_of(plans))
        dataset = self.make_dataset(None)
        exporters = travelled_exporters(stack, self.carried, self.device) if self.carried else {}
        self.model = build(plans, *adopting.conditioning(stack, dataset, exporters))
        self.model.embed = adopting.embedding(exporters)
        # Before the engine is built: its EMA copies are taken from these weights.
        self.new = adopting.adopt(self.model, self.source) if self.source else []
        self.hooks = build_hooks(stack, self.model.spec)
        self.engine = Engine(
            self.model, self.keys, stack.data.batch_size, self.device, self.hooks, dataset.provides
        )
        self.dataset = dataset
        self.probes = {n: c.build(self.model.spec) for n, c in probes.items()}
        check_fields(self.model, dataset)
        if not resume:  # which loads the weights below
            adopting.check_latents(self.model, dataset)
        check_sampler(self.model)
        self.directory = self._open(resume)
        self.metrics, self.readings = JsonLines(self.directory.metrics), JsonLines(self.directory.probes)
        self.engine.run_path = self.directory.path
        if "name" in dataset.fields:
            self.engine.sample_name = lambda index: str(dataset[index]["name"])
        self.saver = Saver(self.directory, self.keys.keep)
        self.stopping = Stopping(alone=self.engine.world == 1)
        self.ending = Ending(self)
        self.together = Together(self.heart, self.stopping, self.ending.meant)
        names = dataset.names.get(self.model.condition or "", ())
        probed = evaluation.probed_factory(stack, self.model.spec, self.make_dataset)
        self.measuring = Measuring(
            self.engine, self.probes, probed, self.readings, self.stopping, exporters, names
        )
        try:
            self.start = self._restore() if resume else 0
        except BaseException:
            self.directory.close()  # or this process could not open it again
            raise
        self.resumed = resume is not None
        self.inside = 0  # the step in progress; between steps 0, and what is in memory may be saved
        self.report: Path | None = None

    def _open(self, resume: Path | None) -> RunDirectory:
        """The first process makes or locks the directory; the others are told where it is."""
        if self.engine.rank == 0:
            directory = self._opened(resume)
            distributed.told(str(directory.path))
            return directory
        return RunDirectory.open(Path(distributed.told(None)))

    def _opened(self, resume: Path | None) -> RunDirectory:
        what = (self.stack, self.dataset, self.engine.world)
        if resume is None:
            return recording.create(*what, self.place, self.made)
        directory = RunDirectory.open(resume, write=True, job=distributed.job())
        self.made(directory.path)
        if self.place:
            recording.complete(directory, *what)
        return directory

    def _restore(self) -> int:
        """Load the newest valid checkpoint; a run that never wrote one begins again."""
        found = self.saver.newest()
        if found is not None:
            parts = checkpoint.opened(found)  # newest() has hashed it
            self.engine.load({k: v for k, v in parts.items() if k != "statistics"}, self.saver.saved or 0)
            if adopting.keeps_latents(self.model):
                self.model.statistics = dict(parts.get("statistics", {}))
        adopting.check_latents(self.model, self.dataset)
        step = self.saver.saved or 0
        if self.engine.rank == 0:
            checkpoint.cut(self.directory.checkpoints, step)
            self.metrics.cut(step)
            done = step == self.keys.steps and not self.directory.finished
            self.readings.cut(step - 1 if done else step)  # the last measurement was cut off: it comes anew
        return step

    # ---- the loop

    def run(self) -> RunDirectory:
        """Train to the last step, then measure and report; a finished run stays as it is."""
        self.progress = Progress(self.keys.steps, self.start, live=None if self.engine.rank == 0 else False)
        self.saver.note = self._note
        try:
            # One of several hears signals to the end: as soon as one leaves, the launcher ends the others.
            with handled(self.stopping) if self.engine.world > 1 else contextlib.nullcontext():
                try:
                    self._all()
                except Interrupted:
                    raise self.ending.stopped() from None
                except (Exception, SystemExit) as error:
                    fault = self.ending.failed(error)
                    if fault is None or fault is error:
                        raise
                    raise fault from error
        finally:
            self.heart.stop()
            self.progress.close()
            self.metrics.close()
            self.readings.close()
            self.directory.close()
        return self.directory

    def _note(self, line: str) -> None:
        """Print a line that stays, once for all processes."""
        if self.engine.rank == 0:
            self.progress.note(line)

    def _all(self) -> None:
        if self.source is not None:
            new = f"; new: {', '.join(self.new)}" if self.new else ""
            self._note(f"tokenizer from {self.source.path}{new}")
        if self.start == self.keys.steps and self.directory.finished:
            self._note(f"{self.directory.path} is finished: {self.start} of {self.start} steps")
            self.report = self.directory.report if self.directory.report.is_file() else None
        else:
            with handled(self.stopping):
                self._train()

    def _train(self) -> None:
        if self.engine.rank == 0:
            recording.note_running(self.directory, self.start if self.resumed else None)
        for line in announced(self.engine):
            self._note(line)
        if adopting.lacks_statistics(self.model):
            self._note("the tokenizer has no latent statistics yet: they are computed first")
            self.model.statistics = self.measuring.computed()
        self.loader = loader_of(self.engine, self.stack, self.dataset, self.start)
        try:
            # Closed on the way out: workers ignore signals, so nothing else would end them.
            with contextlib.closing(iter(self.loader)) as batches:
                self._steps(batches)
        finally:
            rank, world = self.engine.rank, self.engine.world
            if skipped := recording.keep_skipped(self.directory, self.loader, rank, world):
                self.progress.note(skipped)
        self._finish()

    def _steps(self, batches: Iterator[Batch]) -> None:
        every = max(options.steps_of(self.keys.checkpoint_every, self.keys.steps), 1)
        if 0 < self.start < self.keys.steps and not self.measuring.taken(self.start):
            self._measure(self.start)  # the run stopped before it could
        for _ in range(self.start, self.keys.steps):
            began = time.perf_counter()
            self.together.begins(f"waiting for the data of step {self.engine.steps_done + 1}", brief=True)
            batch = self.together(lambda: self._next(batches))
            self._step(batch, began)
            self.stopping.check()
            step = self.engine.steps_done
            if step == self.start + 1:  # now the optimizers have their state
                self.saver.warn(self.engine.state())
            if step < self.keys.steps:
                self._measure(step)
                if step % every == 0:
                    self.save()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        with self.stopping.resting():
            batch = next(batches, None)
        if batch is None:
            raise DataFault(f"data: nothing is left for step {self.engine.steps_done + 1}")
        return batch

    def _measure(self, step: int) -> None:
        if names := evaluation.due(self.stack, step):
            self.together.begins(f"measuring after step {step}")
            self.together(lambda: self.measuring.measure(names, self._note))

    def _step(self, batch: Batch, began: float) -> None:
        """One step and its row; what comes between them must not be saved."""
        fetched = time.perf_counter()
        self.inside = self.engine.steps_done + 1
        self.together.begins(f"in step {self.inside}", limited=True, brief=True)
        row = self.engine.step(self._inputs(batch))
        agreement.check(self.engine)
        self._log(row, began, fetched)
        self.inside = 0

    def _inputs(self, batch: Batch) -> Inputs:
        """A loader's batch as the engine takes it."""
        views = {k: v for k, v in batch.values.items() if k in self.model.views}
        return Inputs(views, {k: v for k, v in batch.values.items() if k not in views}, ids=batch.ids)

    def _log(self, row: dict[str, Any], began: float, fetched: float) -> None:
        ended = time.perf_counter()
        row |= {"time/step": ended - began, "time/data": fetched - began}
        row["images_per_second"] = self.stack.data.batch_size / (ended - began)
        row["step"] = self.engine.steps_done
        if self.engine.rank == 0:
            self.metrics.append(row)
            self.progress.update(self.engine.steps_done, row)

    def save(self, statistics: dict[str, Tensor] | None = None, last: bool = False) -> None:
        """Write a checkpoint of the current step; see :class:`~vtp_core.saving.Saver`."""
        self.together.begins(f"saving step {self.engine.steps_done}")
        self.together(self.metrics.sync, hear=False)  # by itself: no process may fail before others save
        self.together(lambda: self._save(statistics, last), hear=False)

    def _save(self, statistics: dict[str, Tensor] | None, last: bool) -> None:
        parts = self.engine.state() | self.carried
        if statistics := statistics or self.model.statistics:
            parts["statistics"] = statistics
        self.saver.save(parts, self.engine.steps_done, last)

    # ---- after the last step

    def _finish(self) -> None:
        """Save, measure, save again with the latent's statistics, and let hooks write about the run."""
        if self.saver.saved != self.engine.steps_done:
            self.save()
        self._measure(self.keys.steps)
        self.save(self.measuring.statistics(), last=True)
        if self.engine.rank == 0:
            self.directory.mark("finished", step=self.engine.steps_done)
            pages = self.engine.plugins.hook.vtp_finish(run=self.directory.path, registry=self.stack.registry)
            self.report = next((page for page in pages if page is not None), None)
            self.directory.mark("finished", seconds=round(time.perf_counter() - self.began, 1))
