"""The manifest of a checkpoint: its format, its files, and the sha256 of each and of itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtp_core.errors import StorageFault
from vtp_core.run import files
from vtp_core.run.files import open_plain, reason

FORMAT = 2  # of a checkpoint that several processes wrote; that of one process has format 1
_SHA256 = re.compile(r"[0-9a-f]{64}")

Entries = dict[str, dict[str, Any]]


def seal(path: Path, mode: int) -> dict[str, Any]:
    """Make a file durable, as readable as its folder, and describe it."""
    with path.open("rb") as file:
        os.fchmod(file.fileno(), mode & 0o666)
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write(folder: Path, step: int, entries: Entries) -> None:
    """Write ``manifest.json`` of a checkpoint: entries as :func:`seal` makes them, with their ``part``.

    An entry of some rows only has a ``shard`` too; who reads format 1 does not know that such files belong together.
    """
    several = any("shard" in entry for entry in entries.values())
    manifest = {"format": FORMAT if several else 1, "step": step, "files": entries}
    files.replace_json(folder / "manifest.json", {**manifest, "sha256": _digest(manifest)})


def read(path: Path) -> Entries:
    """The files of the checkpoint at ``path``.

    Raises:
        StorageFault: there is no manifest, it is broken, or its format is newer than ours.
    """
    if path.is_symlink() or not path.is_dir():
        what = "a symlink" if path.is_symlink() else "no such folder"
        raise StorageFault(f"{path} is no checkpoint: {what}")
    try:
        manifest = json.loads(files.read(path / "manifest.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, f"manifest.json: {reason(error)}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise broken(path, "manifest.json is no manifest")
    if manifest["format"] > FORMAT:
        raise StorageFault(
            f"{path} has format {manifest['format']}, written by a newer vtp-plugins; this one reads up to "
            f"{FORMAT}\nupgrade: pip install -U vtp-plugins"
        )
    if manifest.get("sha256") != _digest(manifest) or not _sound(manifest.get("files")):
        raise broken(path, "manifest.json does not match its own sha256")
    entries: Entries = manifest["files"]
    return entries


def check(path: Path, entry: Mapping[str, Any], whole: bool) -> None:
    """Compare a file with its entry: the size, and with ``whole`` every byte.

    Raises:
        StorageFault: they differ.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            look = whole and size == entry["bytes"]
            digest = hashlib.file_digest(file, "sha256").hexdigest() if look else entry["sha256"]
    except OSError as error:
        raise broken(path.parent, f"{path.name}: {reason(error)}") from error
    if size != entry["bytes"]:
        raise broken(path.parent, f"{path.name} has {size} bytes, not {entry['bytes']}")
    if digest != entry["sha256"]:
        raise broken(path.parent, f"{path.name} has another sha256 than its manifest says")


def broken(path: Path, what: str) -> StorageFault:
    """The fault of a broken checkpoint, with what to do."""
    run = path.parent.parent
    return StorageFault(f"{path} is broken: {what}\ngo on from the newest valid checkpoint: vtp resume {run}")


def _digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sound(entries: Any) -> bool:
    """Whether a manifest's files are plain names inside the checkpoint, described in full."""
    return (
        isinstance(entries, dict)
        and "state.json" in entries
        and all(
            name == os.path.basename(name) and name not in {"", ".", ".."}
            and isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str) and _SHA256.fullmatch(entry["sha256"])
            and isinstance(entry.get("part", ""), str)
            for name, entry in entries.items()
        )
    )  # fmt: skip
