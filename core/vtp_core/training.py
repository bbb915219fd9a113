"""A run from its stack to its report: data, engine, checkpoints, probes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vtp_core import adopting, distributed, evaluation, options
from vtp_core.attribution import parts_of, translated
from vtp_core.build import blueprint, build, spec_of
from vtp_core.data.loader import Loader
from vtp_core.data.steps import Batch
from vtp_core.describe import plan
from vtp_core.devices import device_of
from vtp_core.engine import Engine
from vtp_core.errors import Fault, StorageFault
from vtp_core.fields import check_fields, loader_of
from vtp_core.forwards import Inputs
from vtp_core.hooks import build_hooks
from vtp_core.measuring import Measuring
from vtp_core.run import checkpoint
from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import JsonLines
from vtp_core.run.names import encode_names
from vtp_core.run.progress import Progress
from vtp_core.saving import Saver
from vtp_core.stack import Stack
from vtp_core.stopping import Interrupted, Preempted, Stopping, handled
from vtp_core.tokenizer import exporters_of
from vtp_core.trial import check_sampler


def train(stack: Stack, resume: Path | None = None) -> RunDirectory:
    """Train a stack to its last step.

    Args:
        stack: loaded with :func:`vtp_core.load_stack`.
        resume: a run directory of this very stack, continued from its newest valid checkpoint.

    Returns:
        The run directory, with metrics, probes, checkpoints and, where a hook writes one, the report.

    Raises:
        StackFault, PluginFault, DataFault, NonFinite, MemoryFault, StorageFault: see ``vtp_plugins.errors``.
        Preempted: SIGTERM, SIGINT or another signal that ends processes came; the run can be continued.
    """
    return Training(stack, resume).run()


class Training:
    """One run in progress; every attribute is built in the constructor, nothing runs there."""

    def __init__(self, stack: Stack, resume: Path | None = None) -> None:
        self.began = time.perf_counter()
        self.stack = stack = stack if resume else adopting.settled(stack)
        self.keys = stack.train
        self.device = device_of(self.keys.device)
        distributed.start(self.device, self.keys.timeout)
        plans = blueprint(stack)
        self.source, self.carried = adopting.beginning(stack, resume)
        probes = evaluation.probe_components(stack)
        self.make_dataset = evaluation.dataset_factory(stack, spec_of(plans))
        dataset = self.make_dataset(None)
        exporters = exporters_of(stack, self.carried, self.device) if self.carried else {}
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
        self.saver = Saver(self.directory, self.keys.keep)
        self.stopping = Stopping()
        names = dataset.names.get(self.model.condition or "", ())
        self.measuring = Measuring(
            self.engine,
            self.probes,
            evaluation.probed_factory(stack, self.model.spec, self.make_dataset),
            self.readings,
            self.stopping,
            exporters,
            names,
        )
        try:
            self.start = self._restore() if resume else 0
        except BaseException:
            self.directory.close()  # or this process could not open it again
            raise
        self.inside = 0  # the step in progress; between steps 0, and what is in memory may be saved
        self.report: Path | None = None

    def _open(self, resume: Path | None) -> RunDirectory:
        """The first process makes or locks the directory; the others are told where it is."""
        if self.engine.rank == 0:
            directory = RunDirectory.open(resume, write=True) if resume else self._create()
        path = distributed.told(str(directory.path) if self.engine.rank == 0 else None)
        return directory if self.engine.rank == 0 else RunDirectory.open(Path(path))

    def _create(self) -> RunDirectory:
        path = Path(self.stack.run.dir) if self.stack.run.dir else None
        data = self.dataset.fingerprint()
        seed, name = self.keys.seed, self.stack.name
        directory = RunDirectory.create(path, self.stack.config, name, seed=seed, data=data)
        page = plan(self.stack, self.engine.world, self.dataset)
        directory.write("plan.txt", str(page))
        directory.write("plan.json", json.dumps(page.data, indent=1))
        directory.write("names.json", encode_names(self.dataset.names))
        return directory

    def _restore(self) -> int:
        """Load the newest valid checkpoint; a run that never wrote one begins again."""
        found = self.saver.newest()
        if found is not None:
            parts, _ = checkpoint.load(found, verify=False)  # newest() has hashed it
            self.engine.load({k: v for k, v in parts.items() if k != "statistics"}, self.saver.saved or 0)
            if adopting.keeps_latents(self.model):
                self.model.statistics = dict(parts.get("statistics", {}))
        adopting.check_latents(self.model, self.dataset)
        step = self.saver.saved or 0
        checkpoint.cut(self.directory.checkpoints, step)
        self.metrics.cut(step)
        done = step == self.keys.steps and not self.directory.finished
        self.readings.cut(step - 1 if done else step)  # the last measurement was cut off: it comes anew
        return step

    # ---- the loop

    def run(self) -> RunDirectory:
        """Train to the last step, then measure and report; a finished run stays as it is."""
        self.progress = Progress(self.keys.steps, self.start)
        self.saver.note = self.progress.note
        if self.source is not None:
            new = f"; new: {', '.join(self.new)}" if self.new else ""
            self.progress.note(f"tokenizer from {self.source.path}{new}")
        try:
            if self.start == self.keys.steps and self.directory.finished:
                self.progress.note(f"{self.directory.path} is finished: {self.start} of {self.start} steps")
                self.report = self.directory.report if self.directory.report.is_file() else None
            else:
                with handled(self.stopping):
                    self._train()
        except Interrupted:
            raise self._stopped() from None
        except (Exception, SystemExit) as error:
            fault = self._failed(error)
            if fault is None or fault is error:
                raise
            raise fault from error
        finally:
            self.progress.close()
            self.metrics.close()
            self.readings.close()
            self.directory.close()
        return self.directory

    def _train(self) -> None:
        if self.engine.rank == 0:
            self.directory.mark("running", fault=None)
        if adopting.lacks_statistics(self.model):
            self.progress.note("the tokenizer has no latent statistics yet: they are computed first")
            self.model.statistics = self.measuring.computed()
        self.loader = loader_of(self.engine, self.stack, self.dataset, self.start)
        try:
            # Closed on the way out: workers ignore signals, so nothing else would end them.
            with contextlib.closing(iter(self.loader)) as batches:
                self._steps(batches)
        finally:
            self._note_bad(self.loader)
        if self.engine.rank == 0:
            self._finish()

    def _steps(self, batches: Iterator[Batch]) -> None:
        every = max(options.steps_of(self.keys.checkpoint_every, self.keys.steps), 1)
        if 0 < self.start < self.keys.steps and not self.measuring.taken(self.start):
            self._measure(self.start)  # the run stopped before it could
        for _ in range(self.start, self.keys.steps):
            began = time.perf_counter()
            with self.stopping.resting():
                batch = next(batches)
            self._step(batch, began)
            self.stopping.check()
            step = self.engine.steps_done
            if step == self.start + 1:  # now the optimizers have their state
                self.saver.warn(self.engine.state())
            if step < self.keys.steps:
                self._measure(step)
                if step % every == 0:
                    self.save()

    def _measure(self, step: int) -> None:
        self.measuring.measure(evaluation.due(self.stack, step), self.progress.note)

    def _step(self, batch: Batch, began: float) -> None:
        """One step and its row; what comes between them must not be saved."""
        fetched = time.perf_counter()
        self.inside = self.engine.steps_done + 1
        row = self.engine.step(self._inputs(batch))
        self._log(row, began, fetched)
        self.inside = 0

    def _note_bad(self, loader: Loader) -> None:
        """Say what was skipped, and keep the list."""
        if not loader.bad:
            return
        reasons = ", ".join(f"{reason}: {count}" for reason, count in loader.bad.items())
        counts = f"{loader.bad.total()} of {loader.read} samples read ({reasons})"
        with contextlib.suppress(StorageFault):  # the run ends anyway, for a reason that matters more
            self.directory.add("skipped.tsv", [f"{n}\t{why}" for n, why in loader.quarantine.items()])
        self.progress.note(f"data: skipped {counts}; named in skipped.tsv")

    def _inputs(self, batch: Batch) -> Inputs:
        """A loader's batch as the engine takes it."""
        views = {k: v for k, v in batch.values.items() if k in self.model.views}
        return Inputs(views, {k: v for k, v in batch.values.items() if k not in views})

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
        if self.engine.rank == 0:
            self.metrics.sync()
            parts = self.engine.state() | self.carried
            if statistics := statistics or self.model.statistics:
                parts["statistics"] = statistics
            self.saver.save(parts, self.engine.steps_done, last)

    # ---- how a run ends before its time

    def _stopped(self) -> Preempted:
        """A signal came: save what may be saved, unless a second one asked for haste."""
        assert self.stopping.asked is not None
        code, step = Interrupted(self.stopping.asked).code, self.engine.steps_done
        if self._unsaved() and not self.stopping.twice:
            with contextlib.suppress(Interrupted), handled(self.stopping):
                self.save(last=True)
        self._mark("preempted")
        return Preempted(f"stopped at step {step}; {self.saver.way_on(self.stack.registry)}", code)

    def _failed(self, error: BaseException) -> Fault | None:
        """The fault that an exception is, with how to go on; None for one of ours."""
        engine = self.engine
        parts = parts_of(self.model, self.probes, self.hooks, self.dataset)
        fault = translated(error, parts, self.inside)
        if self._unsaved() and not isinstance(fault, StorageFault):
            with contextlib.suppress(StorageFault):
                self.save(last=True)
        finished = engine.rank == 0 and self.directory.finished
        if not finished:
            self._mark("failed", fault=str(fault or repr(error)))
        way_on = "the run itself is complete" if finished else self.saver.way_on(self.stack.registry, fault)
        if fault is not None and way_on:
            fault.add_note(way_on)
        return fault

    def _unsaved(self) -> bool:
        """Whether what is in memory is worth a checkpoint and fit for one."""
        return not self.inside and self.engine.steps_done not in (0, self.saver.saved)

    def _mark(self, status: str, **more: Any) -> None:
        """Record how the run stands, as far as the disk lets us."""
        with contextlib.suppress(StorageFault):
            if self.engine.rank == 0:
                self.directory.mark(status, step=self.engine.steps_done, **more)

    # ---- after the last step

    def _finish(self) -> None:
        """Save, measure, save again with the latent's statistics, and let hooks write about the run."""
        if self.saver.saved != self.engine.steps_done:
            self.save()
        self._measure(self.keys.steps)
        self.save(self.measuring.statistics(), last=True)
        self.directory.mark("finished", step=self.engine.steps_done)
        pages = self.engine.plugins.hook.vtp_finish(run=self.directory.path)
        self.report = next((page for page in pages if page is not None), None)
        self.directory.mark("finished", seconds=round(time.perf_counter() - self.began, 1))
