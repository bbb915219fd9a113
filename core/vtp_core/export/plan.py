"""The files of an export before they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a format makes of a run.

    Attributes:
        main: the file that tells, beside ``config.json``, that a folder holds an export of this format.
        tensors: by file.
        names: of the texts.
        texts: made from what describes the other files; the last one completes the export.
        kept: files as they are.
        drawn: names of files that ``draw`` makes.
        draw: writes them into a folder, from which they are moved.
    """

    main: str
    tensors: dict[str, Tensors]
    names: tuple[str, ...]
    texts: Callable[[Entries], dict[str, str]]
    kept: dict[str, bytes]
    drawn: tuple[str, ...] = ()
    draw: Callable[[Path], None] | None = None

    @property
    def files(self) -> set[str]:
        return {*self.tensors, *self.names, *self.kept, *self.drawn}
