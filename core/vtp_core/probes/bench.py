"""A tokenizer beside the splits of its data; each sample is read once and encoded once for all probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_core.probes import LeftOut

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset, View
    from vtp_plugins.spec import Spec


class Bench:
    """What probes get; see ``vtp_plugins.protocols.Bench``.

    Samples come in one fixed random order, so that the first few of a split stand for it. Samples that
    cannot be read are skipped and counted in ``skipped``.

    Args:
        tokenizer: in eval mode, on its device.
        dataset: makes the dataset of a split, ``None`` the first.
        view: raw signal to (1, ch, *size), without any draw; without it the centre view of the stack's size.
        limit: samples per split, at most.
        batch_size: rows of one pass.
        memory: bytes of signals, and as many of reconstructions, that are kept between probes; beyond
            them they are made again.
        device: where batches go; without it the tokenizer's.
        pause: called with every batch that is handed out, as a place where a run may stop.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Callable[[str | None], Dataset],
        *,
        view: View | None = None,
        limit: int | None = None,
        batch_size: int = 128,
        memory: int = 512 * 2**20,
        device: torch.device | str | None = None,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        self.tokenizer, self._make, self._pause = tokenizer, dataset, pause
        self._view: View = view or centre(tokenizer.spec)
        self._limit, self._batch, self._memory = limit, batch_size, memory
        self._device = torch.device(device or tokenizer.device)
        self._datasets: dict[str, Dataset] = {}
        self._signals: dict[str, _Kept] = {}
        self._decoded: dict[str, _Kept] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self._raw: dict[str, dict[int, list[dict[str, Any]]]] = {}
        self.skipped: dict[str, int] = {}

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits; the first is the one that is trained on."""
        first = self._make(None)
        self._datasets[first.splits[0]] = first
        return tuple(first.splits)

    @property
    def device(self) -> torch.device:
        return self._device

    def dataset(self, split: str) -> Dataset:
        if split not in self.splits:
            raise LookupError(f"no split {split!r}; the dataset has {', '.join(self.splits)}")
        if split not in self._datasets:
            self._datasets[split] = self._make(split)
        return self._datasets[split]

    def images(self, split: str) -> Iterator[Tensor]:
        for signals in self._stream(split):
            self._pause()
            yield _displayed(signals.to(self._device))

    def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        if getattr(self.tokenizer, "decoder", None) is None:
            raise LeftOut("the tokenizer has no decoder")
        signals = self._stream(split)
        if split not in self._decoded:
            self._decoded[split] = _Kept(lambda i: self._decode(signals[i]), len(signals), self._memory)
        for i, decoded in enumerate(self._decoded[split]):
            self._pause()
            yield _displayed(signals[i].to(self._device)), decoded.to(self._device)

    def features(self, split: str) -> dict[str, Any]:
        if split not in self._features:
            parts = [self._encode(images) for images in self.images(split)]
            rows = [row for i in range(len(parts)) for row in self._raw[split][i]]
            fields = sorted(self.dataset(split).fields - {self._view.field})
            out: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._features[split] = out | {name: [row.get(name) for row in rows] for name in fields}
        return self._features[split]

    @torch.no_grad()
    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.tokenizer.features(images)
        latent = self.tokenizer.bottleneck(seen.patches)["latent"]  # the same pass gives both: (B, N, C)
        found = {"cls": seen.cls, "patches": seen.patches.mean(1), "latent": latent.mean(1)}
        return {name: x.float().cpu() for name, x in found.items()}

    @torch.no_grad()
    def _decode(self, signals: Tensor) -> Tensor:
        images = _displayed(signals.to(self._device))
        decoded: Tensor = self.tokenizer.decode(self.tokenizer.encode(images))
        return decoded.float().clamp(0, 1).cpu()

    def _stream(self, split: str) -> _Kept:
        if split not in self._signals:
            dataset = self.dataset(split)
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: self._limit]
            batches = order.split(self._batch)
            self._raw[split], self.skipped[split] = {}, 0
            self._signals[split] = _Kept(
                lambda i: self._read(split, i, batches[i].tolist()), len(batches), self._memory
            )
        return self._signals[split]

    def _read(self, split: str, batch: int, indices: list[int]) -> Tensor:
        """One batch of views; its raw fields are put by, without the signal."""
        views, rows, skipped = [], [], 0
        for index in indices:
            try:
                sample = self.dataset(split)[index]
                views.append(self._view(sample[self._view.field])[0])
            except (ValueError, OSError, TypeError):
                skipped += 1
                continue
            rows.append({name: value for name, value in sample.items() if name != self._view.field})
        if batch not in self._raw[split]:
            self.skipped[split] += skipped
            self._raw[split][batch] = rows
        if not views:
            raise DataFault(f"split {split}: none of {len(indices)} samples in a row could be read")
        return torch.stack(views)


class _Kept:
    """Batches by number, made on first use and kept while they fit into ``budget`` bytes."""

    def __init__(self, make: Callable[[int], Tensor], count: int, budget: int) -> None:
        self._make, self._count, self._left = make, count, budget
        self._held: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._count))

    def __getitem__(self, i: int) -> Tensor:
        if i in self._held:
            return self._held[i]
        batch = self._make(i)
        if batch.nbytes <= self._left:
            self._held[i] = batch
            self._left -= batch.nbytes
        return batch


def _displayed(signals: Tensor) -> Tensor:
    return signals.float() / 255 if signals.dtype == torch.uint8 else signals.float()


@dataclass(frozen=True)
class _Middle:
    """The middle of a signal that is no image, (1, ch, *size)."""

    size: tuple[int, ...]
    field: str
    crops: int | None = 1

    def __call__(self, value: Tensor) -> Tensor:
        for axis, size in enumerate(self.size, start=1):
            if value.shape[axis] < size:
                raise ValueError(f"{self.field}: {tuple(value.shape)} is shorter than {self.size}")
            value = value.narrow(axis, (value.shape[axis] - size) // 2, size)
        return value[None]


def centre(spec: Spec) -> View:
    """The view without any draw: the middle of a signal, at the stack's size."""
    if spec.modality != "image":
        return cast("View", _Middle(spec.size, spec.modality))
    from vtp_core.data.views import Centre

    return cast("View", Centre(spec.size))  # a frozen dataclass: mypy takes its fields for read-only
