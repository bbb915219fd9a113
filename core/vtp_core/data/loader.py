"""Batches of views in order; workers never change their content."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from vtp_core.data.steps import Batch, Steps
from vtp_core.data.workers import Deaths, cause, end, prepare
from vtp_plugins.errors import DataFault
from vtp_plugins.protocols import Dataset, View

COUNTED_FROM = 1000  # samples read before the broken share is judged
REMEMBERED = 10_000  # names kept in the quarantine list


class Loader:
    """This process's batches from step ``start`` on; every batch is a pure function of seed and step.

    Args:
        dataset: samples by index.
        views: views by name.
        rows: local rows to make, by view and raw field; what is not named is not made.
        batch_size: rows of the global batch.
        seed: seed of the run.
        rank: index of this process.
        world: number of processes.
        workers: loader processes; 0 reads in this one.
        start: first step.
        stop: step to end before; None goes on for ever.
        required: raw fields that a sample must have; one that lacks any is passed over and counted.
        max_bad_fraction: share of broken samples, of 1,000 and more that this process has read, above which the
            run stops. Processes do not add up what they have read: it would take a collective a step.
        hints: raw field -> what to write to do without it, quoted when every sample lacks it.
        pin_memory: put tensors into page-locked memory.

    Attributes:
        read: samples read so far.
        bad: samples passed over so far, by reason.
        quarantine: their names, with the reason.
    """

    def __init__(
        self,
        dataset: Dataset,
        views: Mapping[str, View],
        rows: Mapping[str, int],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start: int = 0,
        stop: int | None = None,
        required: frozenset[str] = frozenset(),
        max_bad_fraction: float = 1e-3,
        hints: Mapping[str, str] | None = None,
        pin_memory: bool = False,
    ) -> None:
        read = {views[name].field if name in views else name for name, count in rows.items() if count}
        if absent := sorted((read | required) - dataset.fields):
            held = ", ".join(sorted(dataset.fields))
            message = f"data: the dataset has no {absent[0]!r}, its samples hold {held}"
            raise DataFault(message + advice(absent[0], hints))
        if not len(dataset):
            raise DataFault("data: the dataset is empty")
        if max(rows.values(), default=0) * world > batch_size:
            asked = f"{max(rows.values())} x {world} processes"
            raise ValueError(f"rows: {asked} exceed data.batch_size={batch_size}")
        needed = required | {views[name].field for name in rows if name in views and rows[name]}
        self.steps = Steps(dataset, views, rows, batch_size, seed, rank, world, needed)
        self.start, self.stop, self.workers = start, stop, workers
        self.max_bad_fraction, self.hints, self.pin = max_bad_fraction, dict(hints or {}), pin_memory
        self.read = 0
        self.bad: Counter[str] = Counter()
        self.quarantine: dict[str, str] = {}
        self._broken = 0

    def __iter__(self) -> Generator[Batch, None, None]:
        steps = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        made = self._in_workers(steps) if self.workers else (self.steps[step] for step in steps)
        with contextlib.closing(made):  # or a fault below would leave the workers to the end of the process
            for batch in made:
                self._account(batch)
                yield batch

    def _in_workers(self, steps: Any) -> Generator[Batch, None, None]:
        self.steps.warm(self.start)
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            worker_init_fn=prepare,
            pin_memory=self.pin,
        )
        made = iter(loader)
        with Deaths() as deaths:
            try:
                for step in steps:
                    yield self._received(deaths, made, step)
            finally:
                end(made)

    def _received(self, deaths: Deaths, made: Iterator[Batch], step: int) -> Batch:
        """The batch of a step, once a worker has made it."""
        try:
            with deaths.told():
                return next(made)
        except (RuntimeError, OSError, EOFError) as error:  # a batch half handed over is an OSError
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataFault(
                f"data: a worker died before step {step + 1}: {cause(made, error)}\n"
                f"fewer data.workers than {self.workers} need less memory, 0 reads without them; a run's "
                "stack.yaml may be edited before it is resumed"
            ) from error

    def _account(self, batch: Batch) -> None:
        self.read += batch.read
        for skipped in batch.skipped:
            self.bad[skipped.reason] += 1
            self._broken += skipped.broken
            if len(self.quarantine) < REMEMBERED:
                self.quarantine.setdefault(skipped.name, skipped.detail)
        if batch.fault is not None:
            lacking = [name for name in self.steps.required if self.bad[f"no {name}"]]
            if isinstance(batch.fault, DataFault) and lacking:
                raise DataFault(f"{batch.fault}{advice(lacking[0], self.hints)}") from batch.fault
            raise batch.fault
        if self.read >= COUNTED_FROM and self._broken > self.max_bad_fraction * self.read:
            named = "; ".join(list(self.quarantine.values())[:3])
            raise DataFault(
                f"data: {self._broken} of {self.read} samples read are broken, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}: {named}"
            )


def advice(field_name: str, hints: Mapping[str, str] | None) -> str:
    """What to write to do without a field."""
    return f"; {hints[field_name]} does without it" if hints and field_name in hints else ""
