"""A process's whole batch of a step, as a pure function of seed and step; what a loader's worker holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from vtp_core.attribution import translated
from vtp_core.data import order
from vtp_core.data.pictures import of_disk
from vtp_plugins.errors import DataFault, Fault
from vtp_plugins.protocols import Dataset, View

ATTEMPTS = 1000  # samples tried in place of a broken one before the data counts as unreadable


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
        fault: why no batch could be made; None otherwise.
    """

    step: int
    ids: Tensor
    values: dict[str, Any]
    read: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    fault: Fault | None = None

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
        self.prepared: frozenset[str] = getattr(dataset, "prepared", frozenset()) & dataset.fields
        self._draw: Callable[[int, int], dict[str, Any]] | None = getattr(dataset, "draw", None)
        self._check_prepared()
        self._orders: dict[int, Sequence[int]] = {}
        self._known: dict[int, Skipped] = {}  # unusable samples met before, not decoded again

    def _check_prepared(self) -> None:
        """A field that comes as a view already, made with a latent, has no other views."""
        for name in (name for name in self.views if self.rows.get(name)):
            view = self.views[name]
            if view.field in self.prepared and view.crops != 1:
                raise DataFault(
                    f"views.{name} wants {view.crops} crops of {view.field!r}, but the dataset hands out the one "
                    "its latents were made of; train this objective from images, or leave it out"
                )

    def __getitem__(self, step: int) -> Batch:
        state = torch.default_generator.get_state()
        batch = Batch(step, torch.empty(0, dtype=torch.int64), {})
        try:
            self._fill(batch)
        except Exception as error:  # a DataLoader would wrap what leaves a worker in a traceback
            batch.fault = self._told(error)
        finally:
            torch.default_generator.set_state(state)
        return batch

    def _told(self, error: Exception) -> Fault:
        """An exception as a fault that travels between processes."""
        parts = {"data": self.dataset, **{f"views.{name}": view for name, view in self.views.items()}}
        fault = translated(error, parts)
        if fault is None and isinstance(error, ValueError):  # what a view says of a sample
            fault = DataFault(f"data: {error}")
        if fault is None:
            raise error
        fault.__cause__ = error if fault is not error else error.__cause__
        return fault

    def place(self, step: int) -> list[tuple[int, int]]:
        """(epoch, sample) of each local row before broken samples are replaced."""
        count = max(self.rows.values(), default=0)
        stream = order.batch(self.batch_size, step, self.seed)
        places = [divmod(p, len(self.dataset)) for p in order.local(stream, self.rank, self.world, count)]
        return [(epoch, self._order(epoch)[index]) for epoch, index in places]

    def warm(self, step: int) -> None:
        """Read one sample, so that what the dataset caches is shared by the processes forked next."""
        for epoch, index in self.place(step)[:1]:
            self._sample(epoch, index)

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
        if view.field in self.prepared:
            return sample[view.field][None]  # (ch, *size) -> (1, ch, *size)
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
            sample = self._sample(epoch, index)
            if not isinstance(sample, Skipped):
                return index, sample
            batch.skipped.append(sample)
            met[sample.reason] += 1
        last = batch.skipped[-1]
        reasons = ", ".join(f"{reason}: {n}" for reason, n in met.most_common())
        example = f"for example {last.name}: {last.detail}"
        raise DataFault(f"data: none of {tries} samples is usable ({reasons}); {example}")

    def _sample(self, epoch: int, index: int) -> dict[str, Any] | Skipped:
        if index in self._known:
            return self._known[index]
        try:
            sample = self._drawn(epoch, index)
        except (ValueError, OSError) as error:
            reason = str(getattr(error, "reason", "") or type(error).__name__)
            name = str(getattr(error, "name", "") or f"sample {index}")
            skipped = Skipped(reason, name, str(error), broken=True)
            if of_disk(error):
                return skipped
        else:
            lacking = next((name for name in self.required if sample.get(name) is None), None)
            if lacking is None:
                return sample
            name = str(sample.get("name") or f"sample {index}")
            skipped = Skipped(f"no {lacking}", name, f"has no {lacking}", broken=False)
        self._known[index] = skipped
        return skipped

    def _drawn(self, epoch: int, index: int) -> dict[str, Any]:
        """The sample as its epoch sees it, where the dataset tells epochs apart."""
        if self._draw is None:
            return self.dataset[index]
        return self._draw(index, order.key("draw", self.seed, epoch, index, size=8))


def stacked(column: list[Any]) -> Any:
    """Rows of one view or field as a tensor where they allow it, else the list."""
    if isinstance(column[0], Tensor):
        return torch.stack(column) if all(x.shape == column[0].shape for x in column) else column
    if isinstance(column[0], int | float) and all(isinstance(x, int | float) for x in column):
        return torch.tensor(column)
    return column
