"""Bytes of all tensors that a step makes and that are alive: kept, passing, fetched or gathered."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Live:
    """Storages by the time they are alive, each once.

    Args:
        outside: storages that are not counted, by address.

    Attributes:
        held: bytes now.
        peak: most bytes at one time.
        on: whether new storages count.
    """

    def __init__(self, outside: Container[int]) -> None:
        self.outside = outside
        self.held = self.peak = 0
        self.on = True
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def born(self, tensor: Tensor) -> None:
        """An operator gave this tensor; its storage may be there already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self.on and key not in self._sizes and key not in self.outside:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))
            self._sizes[key] = 0
            self._sized(key, storage.nbytes())

    def stop(self) -> None:
        """New storages count no more: what optimizers keep is counted by itself."""
        self.on = False

    def _sized(self, key: int, size: int) -> None:
        self.held += size - self._sizes[key]
        self.peak = max(self.peak, self.held)
        self._sizes[key] = size

    def _gone(self, key: int, _: Any) -> None:
        self.held -= self._sizes.pop(key)
        del self._watched[key]

    @contextlib.contextmanager
    def resized(self) -> Iterator[None]:
        """See storages that are emptied and filled again, as FSDP2 does it; torch tells nobody of them."""
        original: Any = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            if storage._cdata in self._sizes:
                self._sized(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
