"""``metrics.jsonl`` and ``probes.jsonl``: strict JSON, one row a line, written at once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vtp_core.errors import DataFault, StorageFault
from vtp_core.run.files import read as read_bytes
from vtp_core.run.files import reason, replace, write_all

_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # strict JSON has no such numbers


class JsonLines:
    """A file that rows are appended to.

    A row is in the file when :meth:`append` returns, so a killed process loses none; :meth:`sync` makes
    rows outlive a power failure too. Floats are written with ``repr``: equal numbers are equal text.
    Non-finite numbers are the strings ``NaN``, ``Infinity`` and ``-Infinity``.

    Args:
        path: made if absent; a last line that a crash tore is removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            StorageFault: the disk is full or refuses; no part of the row stays in the file.
        """
        line = (encode(row) + "\n").encode()
        try:
            handle = self._opened()
            end = os.fstat(handle).st_size
            try:
                write_all(handle, line)
            except OSError:
                os.ftruncate(handle, end)
                raise
        except OSError as error:
            raise StorageFault(
                f"{self.path}: a row could not be written: {reason(error)}\n"
                f"make room, then: vtp resume {self.path.parent}"
            ) from error

    def sync(self) -> None:
        """Make every row durable; called before the checkpoint that these rows lead up to."""
        if self._handle is not None:
            os.fsync(self._handle)

    def cut(self, step: int) -> int:
        """Remove rows whose ``step`` is past ``step``, and a torn last line; returns how many rows went."""
        self.close()
        if not self.path.exists():
            return 0
        rows = list(_rows(self.path))
        kept = [line for line, row in rows if not row.get("step", step) > step]
        data = b"".join(line + b"\n" for line in kept)
        if len(data) != self.path.stat().st_size:
            replace(self.path, data)
        return len(rows) - len(kept)

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> int:
        if self._handle is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._handle = os.open(self.path, flags, 0o666)
            _mend(self._handle)
        return self._handle


def _mend(handle: int) -> None:
    """End the file with a whole line, so that the next row does not continue a torn one."""
    size = os.fstat(handle).st_size
    start, tail = size, b""
    while start and b"\n" not in tail:
        length = min(start, 65536)
        start -= length
        tail = os.pread(handle, length, start) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if torn:
        os.ftruncate(handle, size - len(torn))


def encode(row: Mapping[str, Any]) -> str:
    """One row as strict JSON on one line; scalars of torch and numpy become numbers."""
    return json.dumps(_strict(row), allow_nan=False, ensure_ascii=False, separators=(", ", ": "))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, with non-finite numbers as floats; a torn last line is left out.

    Raises:
        DataFault: the file is missing, or a line before the last is broken.
    """
    return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines with what they say; the bytes are kept, so that rewriting a file changes no line."""
    try:
        *lines, _ = read_bytes(path).split(b"\n")  # what follows the last newline is torn, or nothing
    except OSError as error:
        raise DataFault(f"{path} cannot be read: {reason(error)}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataFault(f"{path}, line {number}: not a row; remove that line")
        yield line, {key: _NAMES.get(str(value), value) for key, value in row.items()}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(entry) for entry in value]
    if not isinstance(value, str | int | float) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
