"""Checkpoints: folders that are whole or absent, checked by sha256 before they are believed.

``step-00000250/`` holds one safetensors file per part, ``state.json`` and ``manifest.json``. It is
written under another name, fsynced and renamed, so a process killed at any moment leaves valid
checkpoints and perhaps a ``.tmp-`` folder, which :func:`clean` removes.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtp_core.errors import StorageFault
from vtp_core.run import manifest
from vtp_core.run.files import PARTIAL, read, reason, refuse_symlink, sync_folder

_log = logging.getLogger(__name__)
_ASIDE = ".old-"  # a checkpoint that its own successor is about to replace
_FOLDER = re.compile(r"step-(\d{8,})")

Parts = dict[str, dict[str, Tensor]]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of ``step`` and forget the oldest ones.

    Args:
        folder: ``checkpoints/`` of the run; made if absent.
        step: optimizer steps taken.
        parts: tensors by name, by part; ``optimizer/encoder`` becomes ``optimizer.encoder.safetensors``.
        state: whatever else resuming needs, JSON-able with string keys; tuples come back as lists.
        keep: how many valid checkpoints stay; None keeps all.

    Raises:
        StorageFault: the disk is full or refuses; every older checkpoint is still valid.
    """
    final = folder / f"step-{step:08d}"
    files = _file_names(parts)
    temporary: Path | None = None
    try:
        refuse_symlink(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mode = folder.stat().st_mode
        temporary = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{final.name}-", dir=folder))
        for part, name in files.items():
            save_file(_plain(parts[part]), temporary / name, metadata={"format": "pt"})
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        entries = {
            name: {"part": part, **manifest.seal(temporary / name, mode)} for part, name in files.items()
        }
        entries["state.json"] = manifest.seal(temporary / "state.json", mode)
        temporary.chmod(mode & 0o777)
        manifest.write(temporary, step, entries)
        _publish(temporary, final)
    except (OSError, SafetensorError, StorageFault) as error:
        older = "checkpoints written before are intact" if any(_numbered(folder)) else "there is no older one"
        raise StorageFault(
            f"the checkpoint of step {step} could not be written to {folder}: {reason(error)}\n"
            f"{older}; make room, then: vtp resume {folder.parent}"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        _prune(folder, keep, step)
    return final


def load(
    path: Path, verify: bool = True, only: Collection[str] | None = None
) -> tuple[Parts, dict[str, Any]]:
    """Tensors by part and the state of a checkpoint.

    Args:
        path: ``checkpoints/step-00000250``.
        verify: compare every file that is read with its sha256; its size is always compared.
        only: parts to read; None reads all.

    Raises:
        StorageFault: the checkpoint is broken, of a newer format, or lacks a part of ``only``.
    """
    files = manifest.read(path)
    named = {entry["part"]: name for name, entry in files.items() if "part" in entry}
    wanted = list(named) if only is None else list(only)
    if missing := [part for part in wanted if part not in named]:
        raise StorageFault(f"{path} has no part {missing[0]!r}; it has {', '.join(sorted(named))}")
    for name in ["state.json", *(named[part] for part in wanted)]:
        manifest.check(path / name, files[name], verify)
    try:
        parts = {part: load_file(path / named[part]) for part in wanted}
        state: dict[str, Any] = json.loads(read(path / "state.json"))
    except (OSError, SafetensorError, ValueError) as error:
        raise manifest.broken(path, str(error)) from error
    return parts, state


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        StorageFault: it is broken; the message says what to do.
    """
    files = manifest.read(path)
    for name, entry in files.items():
        manifest.check(path / name, entry, True)


def latest(folder: Path, note: Callable[[str], object] = _log.warning) -> Path | None:
    """The newest valid checkpoint, or None; :func:`load` may then skip ``verify``.

    Args:
        folder: ``checkpoints/`` of a run.
        note: told about every broken one that is passed over, and why.
    """
    for _, path in reversed(list(_numbered(folder))):
        try:
            verify(path)
        except StorageFault as fault:
            note(f"skipped: {str(fault).splitlines()[0]}")
        else:
            return path
    return None


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step-"))


def clean(folder: Path) -> list[str]:
    """Remove what a killed process left behind; returns the names. Call it once the run is locked."""
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(_ASIDE):
            final = folder / path.name.removeprefix(_ASIDE)
            if not final.exists():
                path.rename(final)  # killed between the two renames of a replacement
                continue
        elif not path.name.startswith(PARTIAL):
            continue
        _remove(path)
        removed.append(path.name)
    return removed


def cut(folder: Path, step: int) -> list[str]:
    """Remove checkpoints past ``step``, which a resumed run writes anew; returns their names."""
    gone = [path for number, path in _numbered(folder) if number > step]
    for path in gone:
        _discard(path)
    return [path.name for path in gone]


def short_of_room(folder: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """A warning if the disk has room for fewer than three checkpoints of this size."""
    need = sum(tensor.numel() * tensor.element_size() for part in parts.values() for tensor in part.values())
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free >= 3 * need:
        return None
    return f"{folder} has {free / 2**20:,.0f} MiB free; a checkpoint takes about {need / 2**20:,.0f} MiB"


def _file_names(parts: Mapping[str, object]) -> dict[str, str]:
    names: dict[str, str] = {}
    for part in parts:
        name = quote(part.replace("/", "."), safe="") + ".safetensors"
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
    aside = final.with_name(_ASIDE + final.name)
    if final.is_symlink() or final.exists():
        _remove(aside)
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)  # if it stays, clean() takes it


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """Checkpoints by step, oldest first; symlinks are none."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        if (match := _FOLDER.fullmatch(path.name)) and not path.is_symlink():
            found.append((int(match[1]), path))
    yield from sorted(found)


def _prune(folder: Path, keep: int, step: int) -> None:
    """Keep the checkpoint of ``step`` and the ``keep - 1`` valid ones before it; only then older ones go."""
    kept = 1
    for _, path in reversed([pair for pair in _numbered(folder) if pair[0] < step]):
        if kept < keep:
            kept += _looks_valid(path)  # a broken one stays for its owner to see, and does not count
            continue
        try:
            _discard(path)
        except OSError as error:
            raise StorageFault(f"{path} could not be removed as train.keep asks: {reason(error)}") from error


def _looks_valid(path: Path) -> bool:
    """Whether manifest and sizes agree; cheap, as it is asked at every save."""
    try:
        for name, entry in manifest.read(path).items():
            manifest.check(path / name, entry, False)
    except StorageFault:
        return False
    return True


def _discard(path: Path) -> None:
    """Remove a checkpoint: it disappears at once, its files a little later."""
    doomed = path.with_name(f"{PARTIAL}gone-{path.name}")
    _remove(doomed)
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a folder or whatever else has that name; a symlink is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
