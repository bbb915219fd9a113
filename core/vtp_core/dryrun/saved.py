"""Counting what autograd keeps for the backward: each storage once, for as long as anything holds it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Saved:
    """Bytes that autograd holds, now and at most; what was there before the step is not counted.

    Args:
        outside: storages that are not counted, by address: weights, inputs.
        owner: asked who computes, whenever a tensor is kept that was not.

    Attributes:
        held: bytes now.
        peak: most bytes at one time since :meth:`restart`.
        by: bytes kept in all, by owner.
    """

    def __init__(self, outside: Collection[int] = (), owner: Callable[[], Any] = lambda: None) -> None:
        self.outside, self.owner = outside, owner
        self.held = self.peak = 0
        self.by: Counter[Any] = Counter()
        self._users: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def restart(self) -> int:
        """Begin a new peak; returns the last one."""
        last, self.peak = self.peak, self.held
        return last

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def _take(self, key: int, size: int) -> None:
        self._users[key] += 1
        if self._users[key] == 1:
            self.by[self.owner()] += size
            self.held += size
            self.peak = max(self.peak, self.held)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.held -= size


class _Held:
    """A saved tensor; counts while it lives."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        base = tensor._base if tensor._base is not None else tensor
        self.storage = tensor.untyped_storage()  # held, so that its address stays its own
        self.key, self.size = self.storage._cdata, self.storage.nbytes()
        self.counts = not isinstance(base, nn.Parameter) and self.key not in saved.outside
        if self.counts:
            saved._take(self.key, self.size)

    def __del__(self) -> None:
        if self.counts:
            self.saved._drop(self.key, self.size)


def storages() -> dict[int, Any]:
    """Storages of every tensor that is alive, by address; while they are held, nothing else gets one of these."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor) and _plain(x)]
    return {storage._cdata: storage for storage in (x.untyped_storage() for x in tensors)}


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized
