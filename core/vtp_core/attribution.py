"""Whose fault an exception is: of memory, of storage, or of the plugin whose code raised it."""

from __future__ import annotations

import errno
import functools
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vtp_core.errors import Fault, MemoryFault, PluginFault, StorageFault

if TYPE_CHECKING:
    from vtp_core.build import Model
    from vtp_plugins.protocols import Dataset

_OURS = frozenset({"vtp_core", "vtp_plugins"})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})
_NO_MEMORY = ("can't allocate memory", "out of memory")
_THRIFT = "a smaller data.batch_size, a larger train.accumulate or train.precision=bfloat16 needs less"
_LONGEST = 300  # characters of an exception's own words
_DEALT = (
    "; train.parallel=fsdp2: weights are whole only while `forward` of their module, or a method that the class of "
    "their block names in `entries`, is running"
)


def translated(error: BaseException, parts: Mapping[str, Any] | None = None, step: int = 0) -> Fault | None:
    """The fault behind an exception of a command; None where the exception is ours.

    Args:
        error: what was raised.
        parts: components of the run by their key in the stack, ``objectives.dino``.
        step: the step in which it was raised, counted as ``metrics.jsonl`` counts; 0 outside a step.
    """
    if isinstance(error, Fault):
        return error
    place = f" at step {step}" if step else ""
    if out_of_memory(error):
        return MemoryFault(f"out of memory{place}: {_words(error)}\n{_THRIFT}")
    if isinstance(error, OSError) and error.errno in _FULL:
        return _storage(error, place)
    found = blamed(error, parts or {}, place)
    if found is None and isinstance(error, OSError) and error.errno:
        return _storage(error, place)
    return found


def parts_of(
    model: Model, probes: Mapping[str, Any], hooks: Mapping[str, Any], dataset: Dataset
) -> dict[str, Any]:
    """Every component of a run by its key in the stack."""
    sections: dict[str, Mapping[str, Any]] = {
        "objectives": model.objectives,
        "modules": model.shared,
        "teachers": model.teachers,
        "views": model.views,
        "probes": probes,
        "hooks": hooks,
    }
    found: dict[str, Any] = {**model.tokenizer_modules(), "data": dataset}
    for section, parts in sections.items():
        found |= {f"{section}.{name}": part for name, part in parts.items()}
    return found if model.generator is None else {**found, "generator": model.generator}


def _storage(error: OSError, place: str) -> StorageFault:
    return StorageFault(f"{error.filename or 'output'}: {error.strerror}{place}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the machine had no memory left."""
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)  # torch need not be here
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return named or said or isinstance(error, MemoryError)


def blamed(error: BaseException, parts: Mapping[str, Any], place: str = "") -> PluginFault | None:
    """A fault that names the plugin, its distribution and the line, if a plugin's code raised it."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _plugin(frame)]
    if not frames:
        return None
    package = _plugin(frames[0][0])
    frame, line = [pair for pair in frames if _plugin(pair[0]) == package][-1]
    code, file = frame.f_code, Path(frame.f_code.co_filename).name
    brought = _packages().get(package, f"the plugin file {file}")
    key = _key([frame for frame, _ in frames], parts)
    who = f"{key} ({brought})" if key else brought
    where = f"{file}, line {line}, in {code.co_name}"
    return PluginFault(f"{who} failed{place}: {type(error).__name__}: {_words(error)} ({where})")


def _plugin(frame: FrameType) -> str:
    """The package whose code a frame runs, if it brings a component; empty otherwise."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package if package.startswith("vtp_file_") or package in _packages() else ""


@functools.cache
def _packages() -> dict[str, str]:
    """Distributions by the package that their entry points name, without ours."""
    from vtp_plugins.registry import Registry

    found = {}
    for entry in Registry().entries():
        package = entry.target.partition(":")[0].partition(".")[0]
        if package not in _OURS:
            found[package] = entry.distribution
    return found


def _key(frames: list[FrameType], parts: Mapping[str, Any]) -> str:
    """The stack's key of the component that was called: the first of the frames' ``self`` that is a part."""
    for frame in frames:
        owner = frame.f_locals.get("self")
        same = [key for key, part in parts.items() if part is owner]
        alike = [key for key, part in parts.items() if owner is not None and type(part) is type(owner)]
        if same or alike:
            return (same or alike)[0]
    return ""


def _words(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).splitlines()
    said = (lines[0] if lines else "no message")[:_LONGEST]
    return said + _DEALT if "mixed torch.Tensor and DTensor" in str(error) else said
