"""A part of a checkpoint, read tensor by tensor, or some rows of one: wherever its rows were written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ROWS = "shards"
"""Metadata of a file that holds some rows only: name -> the whole tensor's shape and the first row, as JSON."""


@dataclass(frozen=True)
class _Piece:
    """Rows of a tensor in one file, from ``first`` to before ``end``; a tensor without rows has one piece."""

    file: Any
    first: int
    end: int


class Saved(Mapping[str, Tensor]):
    """Tensors of one part by name; each is read when it is asked for, into memory of its own.

    Args:
        files: that hold the part: one, or one of every process that wrote rows of it.

    Raises:
        ValueError: rows are missing, or held twice.
        OSError, SafetensorError: a file is missing or broken.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._names: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for path in files:
            file: Any = safe_open(path, "pt")
            rows = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                own = tuple(file.get_slice(name).get_shape())
                shape, first = rows.get(name, (own, 0))
                count = own[0] if own else 1
                self._shapes[name] = tuple(shape)
                self._pieces.setdefault(name, []).append(_Piece(file, first, first + count))
        self._names = {name: name for name in self._pieces}
        for name, pieces in self._pieces.items():
            self._check(name, pieces)

    def _check(self, name: str, pieces: list[_Piece]) -> None:
        pieces.sort(key=lambda piece: piece.first)
        shape, reached = self._shapes[name], 0
        for piece in pieces:
            if piece.first != reached:
                raise ValueError(f"{name}: row {min(reached, piece.first)} is in no file, or in two")
            reached = piece.end
        if reached != (shape[0] if shape else 1):
            raise ValueError(f"{name}: row {reached} is in no file")

    def under(self, prefix: str) -> Saved:
        """Those tensors whose names begin so, by the rest of their names."""
        found = Saved([])
        found._shapes, found._pieces = self._shapes, self._pieces
        found._names = {k.removeprefix(prefix): v for k, v in self._names.items() if k.startswith(prefix)}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; nothing is read."""
        return self._shapes[self._names[name]]

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows of a tensor from ``first`` to before ``end``, in memory of their own."""
        key = self._names[name]
        within = [(p, max(first, p.first), min(end, p.end)) for p in self._pieces[key]]
        found = [p.file.get_slice(key)[a - p.first : b - p.first] for p, a, b in within if a < b]
        found = found or [self._pieces[key][0].file.get_slice(key)[0:0]]
        return torch.cat(found) if len(found) > 1 else found[0]

    def __getitem__(self, name: str) -> Tensor:
        key = self._names[name]
        pieces = self._pieces[key]
        if len(pieces) > 1:
            return self.rows(name, 0, self._shapes[key][0])
        whole: Tensor = pieces[0].file.get_tensor(key)
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self._names  # or Mapping would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def under(tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """Tensors whose names begin so, by the rest of their names; of a :class:`Saved` none is read."""
    if isinstance(tensors, Saved):
        return tensors.under(prefix)
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def rows_of(
    tensors: Mapping[str, Tensor], name: str, first: int, end: int, shape: Sequence[int]
) -> Tensor | None:
    """Rows of one tensor, of a :class:`Saved` without reading the others; None if it is not of that shape."""
    if isinstance(tensors, Saved):
        return tensors.rows(name, first, end) if tensors.shape(name) == tuple(shape) else None
    whole = tensors[name]
    return whole[first:end] if whole.shape == torch.Size(shape) else None
