"""Samples in the order of their dataset, for whoever writes them down; what cannot be read is left out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from vtp_core.data.workers import Deaths, cause, end, prepare
from vtp_core.errors import DataFault, Fault
from vtp_plugins.protocols import Dataset, View


@dataclass(slots=True)
class Rows:
    """Consecutive samples.

    Attributes:
        signals: one by sample, of the view.
        indices: of the samples.
        numbers: integer fields by name, ``label`` among them; None where a sample has none.
        texts: None where a sample has none.
        skipped: names of samples that cannot be read, with the reason.
        fault: of the dataset, which ends the reading.
    """

    signals: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    numbers: dict[str, list[int | None]] = field(default_factory=dict)
    texts: list[str | None] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    fault: Fault | None = None


class Reading(TorchDataset[Rows]):
    """Ranges of samples.

    Args:
        dataset: samples by index.
        view: raw signal to (1, ch, *size), without any draw.
        numbers: integer fields to read.
        labelled: leave out samples without a label.
    """

    def __init__(
        self, dataset: Dataset, view: View, numbers: Sequence[str] = (), labelled: bool = False
    ) -> None:
        self.dataset, self.view, self.numbers, self.labelled = dataset, view, numbers, labelled

    def __getitem__(self, part: range) -> Rows:
        rows = Rows(numbers={name: [] for name in self.numbers})
        for index in part:
            try:
                sample = self.dataset[index]
                signal = self._signal(sample, index)
            except Fault as fault:  # handed over: what a worker raises comes wrapped in a traceback
                rows.fault = fault
                return rows
            except (ValueError, OSError) as error:
                rows.skipped.append(str(error))
                continue
            rows.signals.append(signal)
            rows.indices.append(index)
            for name, column in rows.numbers.items():
                column.append(sample.get(name))
            rows.texts.append(sample.get("text"))
        return rows

    def _signal(self, sample: dict[str, Any], index: int) -> Tensor:
        name = sample.get("name") or f"sample {index}"
        if sample.get(self.view.field) is None:
            raise ValueError(f"{name}: it has no {self.view.field}")
        if self.labelled and sample.get("label") is None:
            raise ValueError(f"{name}: it has no label")
        return self.view(sample[self.view.field])[0]  # (1, ch, *size) -> (ch, *size)


def read(reading: Reading, parts: Sequence[range], workers: int) -> Generator[Rows, None, None]:
    """Rows of all parts, in order.

    Raises:
        DataFault: a worker died.
    """
    if not workers or not parts:
        yield from (_sound(reading[part]) for part in parts)
        return
    loader = DataLoader(
        reading, batch_size=None, sampler=parts, num_workers=workers, worker_init_fn=prepare
    )  # fmt: skip
    made: Iterator[Rows] = iter(loader)
    with Deaths() as deaths:
        try:
            for _ in parts:
                yield _sound(_received(deaths, made))
        finally:
            end(made)


def _received(deaths: Deaths, made: Iterator[Rows]) -> Rows:
    try:
        with deaths.told():
            return next(made)
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataFault(
            f"data: a worker died: {cause(made, error)}; data.workers=0 reads without them"
        ) from error


def _sound(rows: Rows) -> Rows:
    if rows.fault is not None:
        raise rows.fault
    return rows
