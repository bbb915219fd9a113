"""State dicts out of published files: safetensors, or torch's, read without running their code."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.converting.values import not_finite
from vtp_core.errors import DataFault, suggestion

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
HOLDERS = ("ema", "state_dict", "model")
"""Where training scripts keep their networks; an average comes first."""
_PREFIXES = ("module.", "model.")
_COMPILED = "_orig_mod."  # torch.compile puts it before the names of whatever it wraps
_GLOBAL = re.compile(r"(?:GLOBAL|global|class|type)\s+[`']?([\w.]+)")
_PLAIN = (argparse.Namespace,)  # what scripts store beside their weights; it runs no code


def read(file: Path) -> Any:
    """Whatever a file holds.

    Raises:
        DataFault: it can't be read, or only by running code.
    """
    if file.suffix not in SUFFIXES:
        raise DataFault(
            f"{file}: weights are {', '.join(SUFFIXES)}, not {file.suffix or 'a file without a suffix'}"
        )
    if not file.is_file():
        raise DataFault(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([*_PLAIN]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        raise DataFault(f"{file} {_unsafe(error)}") from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        raise DataFault(f"{file} can't be read as weights: {' '.join(str(error).split())[:300]}") from error


def _unsafe(error: UnpicklingError) -> str:
    found = _GLOBAL.search(str(error))
    what = f"holds {found[1]}" if found else "is a pickle of more than tensors"
    return (
        f"{what}, which takes code to read; it was not run\n"
        "ask for safetensors; or, if you trust its source, keep its tensors alone where that code is installed:\n"
        "torch.save(torch.load(FILE, weights_only=False)['model'], NEW)"
    )


class Taken(NamedTuple):
    """The state dict in a file, and what lies beside it.

    Attributes:
        tensors: by their published names, without the prefixes of wrappers.
        left: names in the file of what belongs to others.
    """

    tensors: dict[str, Tensor]
    left: tuple[str, ...]


def state_dict(found: Any, file: Path, key: str | None = None, holders: Sequence[str] = ()) -> Taken:
    """The state dict in what a file holds.

    Args:
        found: as :func:`read` gives it.
        file: for messages.
        key: where it is, ``ema`` or ``trainer.ema``; None looks under ``holders`` and the usual names.
        holders: the importer's own: keys of the file, or prefixes of its names.

    Raises:
        DataFault: there is none, or nothing under ``key``.
    """
    node, left = (_picked(found, file, key), ()) if key else _unwrapped(found, holders)
    tensors = _bare(_tensors(node))
    if not tensors:
        keys = sorted(map(str, node)) if _is(node) else []
        raise DataFault(f"{file} has no tensors there, but {_told(keys)}; --key names where they are")
    if broken := sorted(not_finite(tensors)):
        raise DataFault(f"{file}: {len(broken)} tensors are not finite: {_told(broken)}")
    return Taken(tensors, left)


def _tensors(node: Any) -> dict[str, Tensor]:
    return {name: value for name, value in _items(node) if isinstance(value, Tensor)}


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers put before names: torch.compile anywhere, others where every name has it."""
    plain = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    found = plain if len(plain) == len(tensors) else tensors
    while prefix := next((p for p in _PREFIXES if found and all(name.startswith(p) for name in found)), ""):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _is(node: Any) -> bool:
    return isinstance(node, Mapping)


def _told(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "nothing"
    return f"{shown}, ..." if len(names) > 8 else shown


def _picked(found: Any, file: Path, key: str) -> Any:
    """What lies under ``key``: whole keys first, then a prefix of names."""
    node = found
    for part in key.rstrip(".").split("."):
        below = _below(node, part)
        if below is None:
            keys = {name if _is(value) else name.partition(".")[0] for name, value in _items(node)}
            raise DataFault(f"{file} has no {part!r}{suggestion(part, keys)}")
        node = below
    return node


def _items(node: Any) -> list[tuple[str, Any]]:
    return [(str(name), value) for name, value in node.items()] if _is(node) else []


def _below(node: Any, part: str) -> Any:
    """A mapping under a key, or the names that begin with it; None where there is neither."""
    if _is(node) and _is(node.get(part)):
        return node[part]
    inner = {name[len(part) + 1 :]: value for name, value in _items(node) if name.startswith(f"{part}.")}
    return inner or None


def _unwrapped(found: Any, holders: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The innermost of what holds a network, and the names beside it."""
    node, left = found, list[str]()
    while True:
        node = _bare(tensors) if len(tensors := _tensors(node)) == len(_items(node)) and tensors else node
        named = ((name, below) for name in holders if (below := _below(node, name)) is not None)
        usual = ((name, node[name]) for name in HOLDERS if _is(node) and _is(node.get(name)))
        name, inner = next(named, None) or next(usual, ("", None))
        if inner is None:
            return node, tuple(left)
        left += _beside(node, name)
        node = inner


def _beside(node: Any, taken: str) -> list[str]:
    """Names of tensors, and of mappings of tensors, that are not below a key."""
    others = {k: v for k, v in _items(node) if k != taken and not k.startswith(f"{taken}.")}
    tensors = [name for name, value in others.items() if isinstance(value, Tensor)]
    return tensors + [f"{name}.*" for name, value in others.items() if _tensors(value)]
