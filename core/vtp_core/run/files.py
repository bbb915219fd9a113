"""Writes that a crash leaves either done or not begun, and reads that follow no symlink."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from io import BufferedReader
from pathlib import Path
from typing import Any

from vtp_core.errors import StorageFault

_SYSTEM = re.compile(r"([^:]+) \(os error \d+\)$")  # how safetensors words the system's errors
PARTIAL = ".tmp-"  # whatever starts so is a leftover of a process that died


def refuse_symlink(path: Path) -> None:
    """Raise ``OSError`` if ``path`` is a symlink."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """``os.write`` until every byte is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def replace(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` at once: a reader sees the old bytes or the new ones.

    Raises:
        StorageFault: the disk is full or refuses; the old file is untouched.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
        try:
            os.fchmod(handle, path.parent.stat().st_mode & 0o666)
            write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise StorageFault(f"{path} could not be written: {reason(error)}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def replace_json(path: Path, value: Any) -> None:
    """:func:`replace` with readable JSON."""
    replace(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading; symlinks, pipes and devices are refused.

    Raises:
        OSError: the file is missing, unreadable or not plain.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes would wait for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return open(handle, "rb")


def read(path: Path) -> bytes:
    """The bytes of a plain file, opened by :func:`open_plain`."""
    with open_plain(path) as file:
        return file.read()


def reason(error: BaseException) -> str:
    """What went wrong, for people: the system's words without its numbers."""
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "it is a symlink, and none is followed inside a run"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := _SYSTEM.search(str(error)):
        return found[1].strip()
    return str(error)
