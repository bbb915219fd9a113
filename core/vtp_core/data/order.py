"""The order of the data as pure functions of seed, epoch and step, drawn from Philox words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def key(*parts: object, size: int = 16) -> int:
    """An unsigned integer of ``size`` bytes that stands for ``parts``; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=size).digest(), "little")


def shuffled(count: int, *parts: object) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` keyed by ``parts``."""
    # raw words stay the same over numpy's versions, a Generator's methods need not
    words = np.random.Philox(key=key(*parts)).random_raw(count)
    return np.argsort(words, kind="stable")


class Indices(Sequence[int]):
    """An array of indices read as plain integers."""

    def __init__(self, values: NDArray[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return Indices(self._values[index]) if isinstance(index, slice) else int(self._values[index])


def permutation(count: int, seed: int, epoch: int) -> Sequence[int]:
    """The order of one epoch of ``count`` samples that are equally cheap to read."""
    order = shuffled(count, "epoch", seed, epoch)
    return Indices(order.astype(np.int32) if count < 2**31 else order)


class Windows(Sequence[int]):
    """The order of one epoch of sharded samples: shards are shuffled, then samples inside windows of shards.

    Reading stays near a few shards at a time, and only the window being read is held in memory.

    Args:
        counts: samples of each shard; sample indices run through the shards in order.
        seed: seed of the run.
        epoch: number of the epoch.
        window: shards whose samples are mixed.
    """

    def __init__(self, counts: Sequence[int], seed: int, epoch: int, window: int = 8) -> None:
        self._key, self._arguments = (seed, epoch), (counts, seed, epoch, window)
        sizes = np.asarray(counts, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        shards = shuffled(len(sizes), "shards", seed, epoch)
        self._groups = [shards[i : i + window] for i in range(0, len(shards), window)]
        self._ends = np.cumsum([int(sizes[group].sum()) for group in self._groups], dtype=np.int64)
        self._window = lru_cache(maxsize=2)(self._shuffle_window)

    def __reduce__(self) -> tuple[Any, ...]:
        return Windows, self._arguments  # for workers that are not forked; a cache does not travel

    def _shuffle_window(self, number: int) -> NDArray[np.int64]:
        members = [np.arange(self._first[s], self._first[s + 1]) for s in self._groups[number]]
        samples = np.concatenate(members)
        return samples[shuffled(len(samples), "window", *self._key, number)]

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"an epoch of {len(self)} samples has no position {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return int(self._window(number)[index - before])


def batch(size: int, step: int, seed: int) -> list[int]:
    """Positions, in the run's stream of samples, of a step's global rows, permuted by (seed, step)."""
    return [step * size + int(row) for row in shuffled(size, "rows", seed, step)]


def local(rows: Sequence[int], rank: int, world: int, count: int) -> Sequence[int]:
    """This process's first ``count`` rows: global row i belongs to process i mod ``world``."""
    return rows[rank : count * world : world]
