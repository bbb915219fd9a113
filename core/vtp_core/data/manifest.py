"""``manifest.json`` beside webdataset shards: what each shard is, so that a broken one gives itself away."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtp_core.data.tar import fields_of, read_index
from vtp_core.run.files import replace
from vtp_plugins.errors import DataFault

NAME = "manifest.json"
FORMAT = "vtp shards 1"
MAX_SHARDS = 100_000
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard as its manifest describes it; ``fields`` are those that any of its samples has."""

    name: str
    bytes: int
    sha256: str
    samples: int
    fields: tuple[str, ...]


def expanded(path: str) -> list[Path]:
    """Local shards of a folder, a file or a pattern such as ``data/{0000..0009}.tar``.

    Raises:
        DataFault: the path is an address or a command (``pipe:``), no tar, or matches nothing.
    """
    if ":" in path or "%" in path or path.strip() in {"", "-"} or path != path.strip():
        raise DataFault(
            f"data.path: {path!r} is refused; a folder, a .tar or {{0..9}}.tar of local shards is wanted"
        )
    if Path(path).expanduser().is_dir():
        found = sorted(p for p in Path(path).expanduser().iterdir() if p.suffix == ".tar")
    else:
        found = [Path(p).expanduser() for p in unbraced(path)]
    if not found:
        raise DataFault(f"data.path: {path} holds no .tar shards")
    for shard in found:
        if not shard.is_file():
            raise DataFault(f"data.path: there is no {'shard' if shard.suffix else 'folder'} {shard}")
        if not PLAIN.fullmatch(shard.name):
            raise DataFault(f"data.path: {shard.name!r} is no plain name of an uncompressed .tar shard")
    return found


def unbraced(pattern: str) -> list[str]:
    """A pattern with numeric ranges, written out; zeros in front are kept."""
    pieces = RANGE.split(pattern)  # text, low, high, text, low, high, text
    found, total = [pieces[0]], 1
    for low, high, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        total *= max(0, int(high) - int(low) + 1)
        if total > MAX_SHARDS:
            raise DataFault(f"data.path: {pattern} names more than {MAX_SHARDS} shards")
        numbers = [f"{i:0{len(low)}d}{text}" for i in range(int(low), int(high) + 1)]
        found = [start + number for start in found for number in numbers]
    return found


def write_manifest(path: str | os.PathLike[str]) -> Path:
    """Read every shard of a folder whole and write ``manifest.json`` there.

    Of a path that names some shards only these are read; what the manifest says of the others stays.
    Names behind labels are taken from ``classes.txt``, one a line, if it lies there too.

    Raises:
        DataFault: a shard is broken, or holds members that are refused.
    """
    shards = expanded(os.fspath(path))
    folder = shards[0].parent
    if any(shard.parent != folder for shard in shards):
        raise DataFault(f"data.path: {path} spans several folders; write one manifest for each")
    known = {} if Path(path).expanduser().is_dir() else _earlier(folder)
    known |= {shard.name: described(shard) for shard in shards}
    table: dict[str, Any] = {"format": FORMAT, "shards": [asdict(known[name]) for name in sorted(known)]}
    if (folder / "classes.txt").is_file():
        table["names"] = {"label": (folder / "classes.txt").read_text(encoding="utf-8").splitlines()}
    target = folder / NAME
    replace(target, (json.dumps(table, indent=1) + "\n").encode())
    return target


def _earlier(folder: Path) -> dict[str, Shard]:
    """What an earlier manifest says."""
    return read_manifest(folder)[0] if (folder / NAME).exists() else {}


def described(shard: Path) -> Shard:
    """Size, hash, samples and fields of one shard."""
    try:
        index = read_index(shard)
        fields = fields_of(shard, index)
    except ValueError as error:
        raise DataFault(
            f"data: {error}; repair or remove the shard, then write the manifest again"
        ) from error
    return Shard(shard.name, shard.stat().st_size, sha256(shard), len(index), fields)


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(folder: Path) -> tuple[dict[str, Shard], Mapping[str, Sequence[str]]]:
    """Shards by name, and names behind labels.

    Raises:
        DataFault: there is no manifest, or it cannot be understood.
    """
    remedy = f"write it with `vtp data manifest {folder}`"
    try:
        table = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise ValueError(f"its format is {table['format']!r}, not {FORMAT!r}")
        shards = [Shard(**{**entry, "fields": tuple(entry["fields"])}) for entry in table["shards"]]
        names = {str(k): [str(v) for v in values] for k, values in table.get("names", {}).items()}
        if any(type(n) is not int or n < 0 for shard in shards for n in (shard.bytes, shard.samples)):
            raise ValueError("sizes and counts are whole numbers")
    except FileNotFoundError as error:
        raise DataFault(f"data: {folder} has no {NAME}; {remedy}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataFault(f"data: {folder / NAME} cannot be read ({error}); {remedy}") from error
    return {shard.name: shard for shard in shards}, names
