"""Files below ``$VTP_HOME``: where they lie, their hashes, and the pins that files without a table are held to."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from vtp_core.errors import StorageFault

_PIN = re.compile(r"([0-9a-f]{64})  \S")


def root() -> Path:
    """``$VTP_HOME``, or ``~/.cache/vtp``."""
    return Path(os.environ.get("VTP_HOME") or Path.home() / ".cache" / "vtp").expanduser()


def home() -> Path:
    """Folder of the files that the table pins."""
    return root() / "weights"


def sha256(file: Path) -> str:
    """Hash of a file; once a process, until its size or time changes."""
    stat = file.stat()
    return _hashed(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hashed(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- pins


def pin_of(file: Path) -> Path:
    """Where the hash of a file stands, as ``sha256sum -c`` reads it."""
    return file.with_name(f"{file.name}.sha256")


def pinned(file: Path) -> str | None:
    """The hash that a file was imported with; None where it was not imported."""
    try:
        found = _PIN.match(pin_of(file).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return found[1] if found else None


def pin(file: Path) -> str:
    """Hold a file to what it is now."""
    digest = sha256(file)
    write(pin_of(file), f"{digest}  {file.name}\n".encode("ascii"))
    return digest


# ---- writing


def write(target: Path, data: bytes) -> None:
    """Put bytes at a place at once.

    Raises:
        StorageFault: the folder can't be made or written.
    """
    from vtp_core.run.files import replace

    _make(target.parent)
    replace(target, data)


def place(target: Path, fill: Callable[[Path], object]) -> None:
    """Put a file at a place at once; for those that are too large for memory.

    Args:
        target: the place.
        fill: writes a file of its own.

    Raises:
        StorageFault: the disk is full or refuses; what was there is untouched.
    """
    from vtp_core.run.files import PARTIAL, reason, sync_folder

    _make(target.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{PARTIAL}{target.name}-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            fill(made)
            with made.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(made, target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageFault(f"{target} cannot be written: {reason(error)}") from error


def copy(source: Path, target: Path) -> None:
    """A file as it is, at a place at once; nothing where it lies there already."""
    if not (target.exists() and source.samefile(target)):
        place(target, lambda made: shutil.copyfile(source, made))


def _make(folder: Path) -> None:
    from vtp_core.run.files import reason

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFault(
            f"{folder} cannot be made: {reason(error)}; VTP_HOME names another place"
        ) from error
