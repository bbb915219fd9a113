"""Safetensors in one file, or in several with an index that says which holds what; neither is believed unseen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from vtp_core.errors import DataFault
from vtp_core.run.tensors import read_header

_MAX_INDEX = 1 << 24
_NUMBERS = r"-\d{5}-of-\d{5}"
Files = Mapping[Path, list[str] | None]
T = TypeVar("T")


def files_of(path: Path, weights: str) -> Files:
    """Files of weights, each with the names that the index puts there; None where there is no index.

    Args:
        path: the directory.
        weights: name of the whole file, ``model.safetensors``.

    Raises:
        DataFault: there is neither the file nor an index, or the index is broken.
    """
    if (path / weights).is_file():
        return {path / weights: None}
    index = path / f"{weights}.index.json"
    if not index.is_file():
        pickled = [file.name for file in sorted(path.glob("*.bin"))[:1]]
        why = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
        raise DataFault(f"{path} has neither {weights} nor {index.name}{why}")
    files: dict[Path, list[str]] = {}
    for name, file in _weight_map(index, weights.removesuffix(".safetensors")).items():
        files.setdefault(path / file, []).append(name)
    return dict(sorted(files.items()))


def _weight_map(index: Path, stem: str) -> dict[str, str]:
    """Tensor -> file, both plain names."""
    shard = re.compile(rf"{re.escape(stem)}{_NUMBERS}\.safetensors")
    try:
        with index.open("rb") as stream:
            raw = stream.read(_MAX_INDEX + 1)
        if len(raw) > _MAX_INDEX:
            raise ValueError(f"it is larger than {_MAX_INDEX:,} bytes")
        found = json.loads(raw)["weight_map"]
        if not found or not all(isinstance(f, str) and shard.fullmatch(f) for f in found.values()):
            raise ValueError(f"its weight_map names files other than {stem}-00001-of-00002.safetensors")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataFault(f"{index} cannot be read: {error}") from error
    return dict(found)


def headers(files: Files) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor; of the data nothing is read.

    Raises:
        DataFault: a file is missing or broken, or holds others than the index says.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file, names in files.items():
        own = readable(read_header, file)
        if names is not None and set(names) != set(own):
            raise DataFault(f"{file} does not hold the tensors that the index says")
        found |= own
    return found


def readable(read: Callable[[Path], T], file: Path) -> T:
    """What ``read`` gives of a file.

    Raises:
        DataFault: the file is missing or broken.
    """
    try:
        return read(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataFault(f"{file} cannot be read: {error}") from error
