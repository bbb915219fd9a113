"""Content hashes: of what a stage leaves, and of all that decides it (its key)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vtp_core.errors import DataFault, StorageFault
from vtp_core.run import manifest
from vtp_core.run.files import open_plain, reason
from vtp_plugins.registry import Registry

FORMAT = 1


def digest(tree: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()


def key_of(stage: Any, upstream: Mapping[str, str], data: str | None) -> str:
    """What decides a stage's artefact, as one hash.

    The version of vtp-plugins is no part of it: an upgrade must not train for days what is finished.

    Args:
        stage: its resolved stack, or options, without places of directories.
        upstream: hash of each artefact it reads, by role.
        data: fingerprint of the dataset it reads itself.
    """
    return digest({"format": FORMAT, "stage": stage, "upstream": dict(upstream), "data": data})


def run_artefact(run: Path) -> str:
    """Hash of a run: of the tensors of its final checkpoint, every byte of which is read.

    Raises:
        DataFault: it has no checkpoint.
        StorageFault: the newest checkpoint is broken.
    """
    folders = [path for path in (run / "checkpoints").glob("step-*") if not path.is_symlink()]
    if not folders:
        raise DataFault(f"{run} has no checkpoint")
    newest = max(folders, key=lambda path: (len(path.name), path.name))
    entries = manifest.read(newest)
    for name, entry in entries.items():
        manifest.check(newest / name, entry, True)
    return digest({entry["part"]: entry["sha256"] for entry in entries.values() if "part" in entry})


def code_of(tree: Any, registry: Registry) -> dict[str, str]:
    """Hashes of the single-file plugins that a stage names: their authors change them between two runs."""
    words = set(_words(tree))
    named = [entry for entry in registry.entries() if entry.loaded is not None and entry.name in words]
    files = {Path(entry.target.rpartition(":")[0]) for entry in named}
    return {f"plugin {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def _words(tree: Any) -> Iterator[str]:
    """Every string of a tree, keys included."""
    if isinstance(tree, Mapping):
        yield from map(str, tree)
        tree = list(tree.values())
    if isinstance(tree, list):
        for node in tree:
            yield from _words(node)
    elif isinstance(tree, str):
        yield tree


def run_hash(run: Path) -> str | None:
    """:func:`run_artefact` of a run outside the pipeline; None for what has no checkpoints, as an export."""
    try:
        return run_artefact(run)
    except (DataFault, StorageFault):
        return None


def latents_artefact(folder: Path) -> str:
    """Hash of latents: of their protocol, shards and statistics, every byte of which is read.

    Raises:
        DataFault: they are not finished, or broken.
    """
    from vtp_core.latents.manifest import STATISTICS, read

    found = read(folder)
    files = {shard.name: shard.sha256 for shard in found.shards}
    for name, sha256 in {**files, STATISTICS[found.layout]: found.statistics}.items():
        try:
            with open_plain(folder / name) as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError as error:
            raise DataFault(f"{folder / name}: {reason(error)}") from error
        if not same:
            raise DataFault(f"{folder / name} has another sha256 than its manifest says")
    return digest({**files, "statistics": found.statistics, "protocol": found.protocol})
