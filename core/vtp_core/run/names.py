"""``names.json``: names behind the integer fields of the data that a run was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vtp_core.errors import DataFault

FILE = "names.json"


def encode_names(names: Mapping[str, Sequence[str]]) -> str:
    """The file's text."""
    return json.dumps({field: list(values) for field, values in names.items()}, ensure_ascii=False)


def names_of(run: Path) -> dict[str, list[str]]:
    """Field -> names; empty for a run that has none.

    Raises:
        DataFault: the file is broken.
    """
    file = run / FILE
    if not file.is_file():
        return {}
    try:
        found: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFault(f"{file} is broken: {error}") from error
    return found
