"""A run from its stack to its report: data, engine, checkpoints, probes."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from vtp_core import distributed, evaluation, options
from vtp_core.build import blueprint, build
from vtp_core.components import resolve
from vtp_core.data.loader import Batch, Loader
from vtp_core.describe import plan
from vtp_core.engine import Engine
from vtp_core.errors import DataFault, Fault, MemoryFault, StackFault, StorageFault
from vtp_core.forwards import Inputs
from vtp_core.probes import run_probes
from vtp_core.probes.bench import Bench
from vtp_core.run import checkpoint
from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import JsonLines
from vtp_core.run.progress import Progress
from vtp_core.stack import Stack
from vtp_core.statistics import latent_statistics
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.reading import Reading


FAILURES = 3  # checkpoints in a row that may fail before the run gives up


class Preempted(Fault):
    """The run was asked to stop; it saved a checkpoint first."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def train(stack: Stack, resume: Path | None = None) -> RunDirectory:
    """Train a stack to its last step.

    Args:
        stack: loaded with :func:`vtp_core.load_stack`.
        resume: a run directory of this very stack, continued from its newest valid checkpoint.

    Returns:
        The run directory, with metrics, probes, checkpoints and, where a hook writes one, the report.

    Raises:
        StackFault, PluginFault, DataFault, NonFinite, MemoryFault, StorageFault: see ``vtp_plugins.errors``.
        Preempted: SIGTERM or SIGINT came; a checkpoint was saved.
    """
    return Training(stack, resume).run()


class Training:
    """One run in progress; every attribute is built in the constructor, nothing runs there."""

    def __init__(self, stack: Stack, resume: Path | None = None) -> None:
        self.began = time.perf_counter()
        self.stack, self.keys = stack, stack.train
        self.device = device_of(self.keys.device)
        distributed.start(self.device)
        plans = blueprint(stack)
        self.probe_components = evaluation.probe_components(stack)
        self.make_dataset = evaluation.dataset_factory(stack)
        dataset = self.make_dataset(None)
        self.model = build(plans, classes=len(dataset.names.get("label", ())))
        self.engine = Engine(
            self.model, self.keys, stack.data.batch_size, self.device, build_hooks(stack, self.model.spec),
            dataset.provides,
        )  # fmt: skip
        self.dataset = dataset
        self.probes = {n: c.build(self.model.spec) for n, c in self.probe_components.items()}
        self._check_fields()
        self.directory = self._open(resume)
        self.metrics, self.readings = JsonLines(self.directory.metrics), JsonLines(self.directory.probes)
        self.engine.run_path = self.directory.path
        self.start = self._restore() if resume else 0
        self.asked: int | None = None
        self.failures = 0
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
        directory = RunDirectory.create(path, self.stack.config, self.stack.name, seed=self.keys.seed, data=data)
        page = plan(self.stack, self.engine.world)
        directory.write("plan.txt", str(page))
        directory.write("plan.json", json.dumps(page.data, indent=1))
        return directory

    def _check_fields(self) -> None:
        """Every field that a view or objective reads must be one that the dataset has."""
        for name, objective in self.model.objectives.items():
            for need in objective.needs.values():
                view = self.model.views.get(need.view)
                field = view.field if view is not None else need.view
                if field not in self.dataset.fields | self.dataset.provides:
                    raise DataFault(
                        f"the dataset has no {field!r}, which objectives.{name} reads; "
                        f"train without it: objectives.{name}=null"
                    )

    def _restore(self) -> int:
        found = checkpoint.latest(self.directory.checkpoints)
        if found is None:
            raise DataFault(f"{self.directory.path} has no valid checkpoint; start it again with vtp train")
        parts, state = checkpoint.load(found, verify=False)  # latest() has hashed it
        step = int(state["step"])
        self.engine.load({k: v for k, v in parts.items() if k != "statistics"}, step)
        checkpoint.cut(self.directory.checkpoints, step)
        self.metrics.cut(step)
        self.readings.cut(step)
        return step

    # ---- the loop

    def run(self) -> RunDirectory:
        """Train to the last step, then measure and report."""
        loader = self._loader()
        self.progress = Progress(self.keys.steps, self.start)
        try:
            # Closed on the way out: workers ignore signals, so nothing else would end them.
            with self._signals(), contextlib.closing(iter(loader)) as batches:
                self._steps(batches)
            self._note_bad(loader)
            self._finish()
        except torch.OutOfMemoryError as error:
            raise MemoryFault(
                f"out of memory at step {self.engine.steps_done}: {str(error).splitlines()[0]}\nthe last checkpoint is "
                f"intact. Try data.batch_size={self.stack.data.batch_size // 2}, train.accumulate=2 or "
                "train.precision=bfloat16"
            ) from error
        finally:
            self.progress.close()
            self.metrics.close()
            self.readings.close()
            self.directory.close()
        return self.directory

    def _loader(self) -> Loader:
        rows = self.engine.layout.rows_by_view()
        data = self.stack.data
        required = {view.field for view in self.model.views.values()} | self.engine.layout.fields
        return Loader(
            self.dataset, {n: v for n, v in self.model.views.items() if n in rows}, rows,
            batch_size=data.batch_size, seed=self.keys.seed, rank=self.engine.rank, world=self.engine.world,
            workers=data.workers, start=self.start, stop=self.keys.steps, required=frozenset(required),
            max_bad_fraction=data.max_bad_fraction, hints=self._hints(),
        )  # fmt: skip

    def _hints(self) -> dict[str, str]:
        """Field -> the override that does without it."""
        hints = {}
        for name, objective in self.model.objectives.items():
            for need in objective.needs.values():
                view = self.model.views.get(need.view)
                if view is None or view.crops is None:
                    hints[need.view if view is None else view.field] = f"objectives.{name}=null"
        return hints

    def _steps(self, batches: Iterator[Batch]) -> None:
        every = max(options.steps_of(self.keys.checkpoint_every, self.keys.steps), 1)
        for _ in range(self.start, self.keys.steps):
            began = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            row = self.engine.step(self._inputs(batch))
            self._log(row, began, fetched)
            step = self.engine.steps_done
            if self.asked is not None:
                self._stop(step)
            if step < self.keys.steps:
                self.measure(evaluation.due(self.stack, step))
                if step % every == 0:
                    self.save()

    def _note_bad(self, loader: Loader) -> None:
        """Say what was skipped, and keep the list."""
        if not loader.bad:
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in loader.bad.items())
        lines = [f"{name}\t{detail}" for name, detail in loader.quarantine.items()]
        self.directory.write("skipped.tsv", "\n".join(lines) + "\n")
        self.progress.note(f"data: skipped {reasons} of {loader.read} samples read; named in skipped.tsv")

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
        """Write a checkpoint of the current step.

        A full disk is waited out: training goes on, and only the third failure in a row, or the last
        checkpoint's, ends the run.
        """
        if self.engine.rank != 0:
            return
        parts = self.engine.state() | ({"statistics": statistics} if statistics else {})
        step = self.engine.steps_done
        try:
            self.metrics.sync()
            checkpoint.save(self.directory.checkpoints, step, parts, {"step": step}, keep=self.keys.keep)
            self.failures = 0
        except StorageFault as fault:
            self.failures += 1
            if last or self.failures == FAILURES:
                raise
            self.progress.note(f"{fault} (attempt {self.failures} of {FAILURES}; training goes on)")

    def _stop(self, step: int) -> None:
        self.save(last=True)
        self.directory.mark("preempted", step=step)
        assert self.asked is not None
        code = 130 if self.asked == signal.SIGINT else 75
        raise Preempted(f"stopped after step {step}; continue with: vtp resume {self.directory.path}", code)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step in progress; a second one ends it at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.asked is not None:
                raise KeyboardInterrupt
            self.asked = number

        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: the caller's handlers stay
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- measuring

    def tokenizer(self) -> Tokenizer:
        """The live modules as a tokenizer."""
        return Tokenizer(self.model, self.model.objectives)

    def measure(self, names: list[str]) -> None:
        """Run probes on the student as it is; training mode is restored."""
        if not names or self.engine.rank != 0:
            return
        modules = list(self.model.modules().values())
        for module in modules:
            module.eval()
        tokenizer = self.tokenizer()
        bench = Bench(tokenizer, self.make_dataset, device=self.device)
        with torch.no_grad():
            readings, left_out = run_probes(tokenizer, {n: self.probes[n] for n in names}, bench)
        for module in modules:
            module.train()
        self._record(readings, left_out)

    def _record(self, readings: list[Reading], left_out: list[str]) -> None:
        step = self.engine.steps_done
        for reading in readings:
            self.readings.append({"step": step, **as_row(reading)})
        for line in left_out:
            self.progress.note(line)
        self.engine.plugins.hook.vtp_probe(engine=self.engine, step=step, readings=readings)

    def _finish(self) -> None:
        """Statistics, the last checkpoint, all probes, and whatever hooks write about the run."""
        if self.engine.rank != 0:
            return
        self.measure(evaluation.due(self.stack, self.keys.steps))
        trained = {"encoder", "bottleneck"} - self.model.frozen
        statistics = {}
        if self.model.encoder is not None and trained:
            statistics = latent_statistics(self.tokenizer(), Bench(self.tokenizer(), self.make_dataset, device=self.device))
        self.save(statistics, last=True)
        self.directory.mark("finished", step=self.engine.steps_done)
        pages = self.engine.plugins.hook.vtp_finish(run=self.directory.path)
        self.report = next((page for page in pages if page is not None), None)
        self.directory.mark("finished", seconds=round(time.perf_counter() - self.began, 1))


def as_row(reading: Reading) -> dict[str, Any]:
    """A reading as a row of ``probes.jsonl``."""
    return {
        "probe": reading.probe, "split": reading.split, "value": reading.value, "n": reading.n,
        "protocol": reading.protocol,
    }  # fmt: skip


def device_of(name: str) -> torch.device:
    """``auto`` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise StackFault(f"train.device: {str(error).splitlines()[0]}") from error


def build_hooks(stack: Stack, spec: Any) -> dict[str, Any]:
    """The stack's hook plugins and trackers, built."""
    nodes = stack.section("hooks") | {name: {} for name in stack.train.trackers}
    return {n: resolve(stack.registry, "hooks", f"hooks.{n}", node, stack.dial).build(spec) for n, node in nodes.items()}

