"""Batches of views; an item is a process's whole batch of a step, so workers never change its content."""

from __future__ import annotations

import itertools
import math
import signal
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from vtp_core.data import order
from vtp_plugins.errors import DataFault
from vtp_plugins.protocols import Dataset, View

ATTEMPTS = 1000  # samples tried in place of a broken one before the data counts as unreadable
COUNTED_FROM = 1000  # samples read before the broken share is judged
REMEMBERED = 10_000  # names kept in the quarantine list


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample passed over: why, which, and whether it was broken or merely lacked a field."""

    reason: str
    name: str
    detail: str
    broken: bool


@dataclass(slots=True)
class Batch:
    """This process's rows of one step.

    Attributes:
        step: the step they belong to.
        ids: sample indices, (R,) int64, in row order.
        values: by view or raw field: (R_v, K, ...) uint8 for a view, (R_v,) or a list for a field.
        read: samples read to make it.
        skipped: samples passed over.
        fault: why no batch could be made; empty otherwise.
    """

    step: int
    ids: Tensor
    values: dict[str, Any]
    read: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    fault: str = ""

    def pin_memory(self) -> Batch:
        """The same with tensors in page-locked memory, for asynchronous copies to a GPU."""
        self.values = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.values.items()}
        return self


class Steps(TorchDataset[Batch]):
    """Batches by step; what a worker holds."""

    def __init__(
        self,
        dataset: Dataset,
        views: Mapping[str, View],
        rows: Mapping[str, int],
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        required: frozenset[str],
    ) -> None:
        self.dataset, self.views, self.rows = dataset, dict(views), dict(rows)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.required = sorted(required)
        self._orders: dict[int, Sequence[int]] = {}
        self._known: dict[int, Skipped] = {}  # broken samples met before, so they are not decoded again

    def __getitem__(self, step: int) -> Batch:
        state = torch.default_generator.get_state()
        batch = Batch(step, torch.empty(0, dtype=torch.int64), {})
        try:
            self._fill(batch)
        except DataFault as fault:
            batch.fault = str(fault)  # travels as text: a DataLoader would wrap the exception in a traceback
        finally:
            torch.default_generator.set_state(state)
        return batch

    def place(self, step: int) -> list[tuple[int, int]]:
        """(epoch, sample) of each local row before broken samples are replaced."""
        count = max(self.rows.values(), default=0)
        stream = order.batch(self.batch_size, step, self.seed)
        places = [divmod(p, len(self.dataset)) for p in order.local(stream, self.rank, self.world, count)]
        return [(epoch, self._order(epoch)[index]) for epoch, index in places]

    def warm(self, step: int) -> None:
        """Read one sample, so that what the dataset caches is shared by the processes forked next."""
        for _, index in self.place(step)[:1]:
            self._sample(index)

    def _order(self, epoch: int) -> Sequence[int]:
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 1}
            self._orders[epoch] = self.dataset.order(self.seed, epoch)
        return self._orders[epoch]

    def _fill(self, batch: Batch) -> None:
        ids: list[int] = []
        columns: dict[str, list[Any]] = {name: [] for name, rows in self.rows.items() if rows}
        for row, (epoch, first) in enumerate(self.place(batch.step)):
            index, sample = self._readable(epoch, first, batch)
            ids.append(index)
            for name, column in columns.items():
                if row < self.rows[name]:
                    column.append(self._value(name, sample, epoch, index))
        batch.ids = torch.tensor(ids, dtype=torch.int64)
        batch.values = {name: stacked(column) for name, column in columns.items()}

    def _value(self, name: str, sample: Mapping[str, Any], epoch: int, index: int) -> Any:
        if name not in self.views:
            return sample[name]
        view = self.views[name]
        torch.default_generator.manual_seed(order.key("view", self.seed, epoch, index, name, size=8))
        return view(sample[view.field])

    def _readable(self, epoch: int, first: int, batch: Batch) -> tuple[int, dict[str, Any]]:
        """Sample ``first``, or the first usable one of a walk keyed by seed, epoch and sample."""
        count = len(self.dataset)
        stride = order.key("instead", self.seed, epoch, first, size=8) % count or 1
        while math.gcd(stride, count) != 1:
            stride += 1
        tries = min(count, ATTEMPTS)
        met: Counter[str] = Counter()
        for attempt in range(tries):
            index = (first + attempt * stride) % count
            batch.read += 1
            sample = self._sample(index)
            if not isinstance(sample, Skipped):
                return index, sample
            batch.skipped.append(sample)
            met[sample.reason] += 1
        last = batch.skipped[-1]
        reasons = ", ".join(f"{reason}: {n}" for reason, n in met.most_common())
        example = f"for example {last.name}: {last.detail}"
        raise DataFault(f"data: none of {tries} samples is usable ({reasons}); {example}")

    def _sample(self, index: int) -> dict[str, Any] | Skipped:
        if index in self._known:
            return self._known[index]
        try:
            sample = self.dataset[index]
        except (ValueError, OSError) as error:
            reason = str(getattr(error, "reason", "") or type(error).__name__)
            name = str(getattr(error, "name", "") or f"sample {index}")
            skipped = Skipped(reason, name, str(error), broken=True)
        else:
            lacking = next((name for name in self.required if sample.get(name) is None), None)
            if lacking is None:
                return sample
            name = str(sample.get("name") or f"sample {index}")
            skipped = Skipped(f"no {lacking}", name, f"has no {lacking}", broken=False)
        self._known[index] = skipped
        return skipped


def stacked(column: list[Any]) -> Any:
    """Rows of one view or field as a tensor where they allow it, else the list."""
    if isinstance(column[0], Tensor):
        return torch.stack(column) if all(x.shape == column[0].shape for x in column) else column
    if isinstance(column[0], int | float) and all(isinstance(x, int | float) for x in column):
        return torch.tensor(column)
    return column


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
        max_bad_fraction: share of broken samples, of 1,000 and more read, above which the run stops.
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
        for batch in made:
            self._account(batch)
            yield batch

    def _in_workers(self, steps: Any) -> Iterator[Batch]:
        self.steps.warm(self.start)
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            worker_init_fn=leave_signals,
            pin_memory=self.pin,
        )
        step = self.start
        try:
            for batch in loader:
                step = batch.step + 1
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            first = str(error).splitlines()[0]
            message = f"data: a worker died near step {step}: {first} data.workers=0 reads without workers"
            raise DataFault(message) from error

    def _account(self, batch: Batch) -> None:
        self.read += batch.read
        for skipped in batch.skipped:
            self.bad[skipped.reason] += 1
            self._broken += skipped.broken
            if len(self.quarantine) < REMEMBERED:
                self.quarantine.setdefault(skipped.name, skipped.detail)
        if batch.fault:
            lacking = [name for name in self.steps.required if self.bad[f"no {name}"]]
            raise DataFault(batch.fault + (advice(lacking[0], self.hints) if lacking else ""))
        if self.read >= COUNTED_FROM and self._broken > self.max_bad_fraction * self.read:
            named = "; ".join(list(self.quarantine.values())[:3])
            raise DataFault(
                f"data: {self._broken} of {self.read} samples read are broken, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}: {named}"
            )


def advice(field_name: str, hints: Mapping[str, str] | None) -> str:
    """What to write to do without a field."""
    return f"; {hints[field_name]} does without it" if hints and field_name in hints else ""


def leave_signals(_: int) -> None:
    """Workers outlive an interrupt, so that the main process can finish its step and its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
