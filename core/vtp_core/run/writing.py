"""Writing a checkpoint: by one process, or by several that end as one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vtp_core import distributed, shards
from vtp_core.errors import StorageFault
from vtp_core.run import manifest
from vtp_core.run.files import PARTIAL, reason, refuse_symlink, sync_folder
from vtp_core.run.saved import ROWS

T = TypeVar("T")
ASIDE = ".old-"  # a checkpoint that its own successor is about to replace
_SUFFIX = ".safetensors"


def write(
    final: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint under another name and rename it; every process of a run calls this.

    What all processes hold alike is written by the first one, rows by whoever holds them. Nothing is renamed
    before all have told that their files are on the disk.

    Raises:
        StorageFault: of any process, on all of them.
    """
    files, first = _file_names(parts), distributed.rank() == 0
    temporary: Path | None = None
    try:
        made = everywhere(lambda: _begun(final) if first else None)[0]
        assert made is not None, "the first process made it"
        temporary, mode = made
        entries: manifest.Entries = {}
        for own in everywhere(lambda: _written(made[0], files, parts, mode)):
            entries |= own
        everywhere(lambda: _completed(made[0], final, step, entries, state, mode) if first else None)
    finally:
        if temporary is not None and first:
            shutil.rmtree(temporary, ignore_errors=True)


def everywhere(work: Callable[[], T]) -> list[T]:
    """What each process's ``work`` returns, by rank; what fails on one fails on all of them.

    Raises:
        StorageFault: on another process; this one's own error is raised as it is.
    """
    failed: Exception | None = None
    outcome: tuple[T | None, str] = (None, "")
    try:
        outcome = (work(), "")
    except (OSError, SafetensorError, StorageFault) as error:
        failed, outcome = error, (None, reason(error))
    said = distributed.gathered(outcome)
    if failed is not None:
        raise failed
    for rank, (_, why) in enumerate(said):
        if why:
            raise StorageFault(f"process {rank}: {why}")
    return [found for found, _ in said]


def _begun(final: Path) -> tuple[Path, int]:
    """The temporary folder of a checkpoint, and the mode that its files get."""
    folder = final.parent
    refuse_symlink(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{final.name}-", dir=folder)), folder.stat().st_mode


def _written(
    temporary: Path, files: Mapping[str, str], parts: Mapping[str, Mapping[str, Tensor]], mode: int
) -> manifest.Entries:
    """Write what this process is to write; returns its entries of the manifest."""
    rank, world, entries = distributed.rank(), distributed.world_size(), {}
    for part, name in files.items():
        tensors = {k: v for k, v in parts[part].items() if not shards.is_shard(v)}
        held = {k: v for k, v in parts[part].items() if shards.is_shard(v)}
        if rank == 0 and (tensors or not held):
            save_file(_plain(tensors), temporary / name, metadata={"format": "pt"})
            entries[name] = {"part": part, **manifest.seal(temporary / name, mode)}
        rows = {k: shards.local(v) for k, v in held.items() if shards.local(v).numel()}
        if rows:
            name = f"{name.removesuffix(_SUFFIX)}.rank-{rank + 1:05d}-of-{world:05d}{_SUFFIX}"
            where = {k: (tuple(v.shape), shards.span(v)[0]) for k, v in held.items()}
            save_file(_plain(rows), temporary / name, metadata={"format": "pt", ROWS: json.dumps(where)})
            entries[name] = {"part": part, "shard": rank, **manifest.seal(temporary / name, mode)}
    if rank != 0 and entries:
        sync_folder(temporary)
    return entries


def _completed(
    temporary: Path, final: Path, step: int, entries: manifest.Entries, state: Mapping[str, Any], mode: int
) -> None:
    """Name every file in the manifest, and give the folder its name."""
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    entries["state.json"] = manifest.seal(temporary / "state.json", mode)
    temporary.chmod(mode & 0o777)
    manifest.write(temporary, step, entries)
    _publish(temporary, final)


def _file_names(parts: Mapping[str, object]) -> dict[str, str]:
    names: dict[str, str] = {}
    for part in parts:
        name = quote(part.replace("/", "."), safe="") + _SUFFIX
        if name in names.values():
            raise ValueError(f"part {part!r}: another part is stored as {name} too; rename one")
        names[part] = name
    return names


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU tensors of which no two share memory."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        if tensor.numel() and place in seen:
            tensor = tensor.clone()
        seen.add(place)
        plain[name] = tensor
    return plain


def _publish(temporary: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step is moved aside first, so one of them survives."""
    sync_folder(temporary)
    aside = final.with_name(ASIDE + final.name)
    if final.is_symlink() or final.exists():
        remove(aside)
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)  # if it stays, clean() takes it


def remove(path: Path) -> None:
    """Remove a folder or whatever else has that name; a symlink is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
