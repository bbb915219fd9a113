"""Checkpoints: folders that are whole or absent, checked by sha256 before they are believed.

``step-00000250/`` holds one safetensors file per part, ``state.json`` and ``manifest.json``. It is
written under another name, fsynced and renamed, so a process killed at any moment leaves valid
checkpoints and perhaps a ``.tmp-`` folder, which :func:`clean` removes.

Where processes hold rows of a part's tensors (``parallel: fsdp2``), each writes its own into
``<part>.rank-00001-of-00004.safetensors``; whoever reads gets whole tensors, or any rows of them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtp_core import distributed
from vtp_core.errors import StorageFault
from vtp_core.run import manifest, writing
from vtp_core.run.files import PARTIAL, read, reason
from vtp_core.run.saved import Saved
from vtp_core.run.writing import ASIDE, remove

_log = logging.getLogger(__name__)
_FOLDER = re.compile(r"step-(\d{8,})")

Parts = dict[str, dict[str, Tensor]]


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write the checkpoint of ``step`` and forget the oldest ones; every process of a run calls this.

    Args:
        folder: ``checkpoints/`` of the run; made if absent.
        step: optimizer steps taken.
        parts: tensors by name, by part; ``optimizer/encoder`` becomes ``optimizer.encoder.safetensors``. What all
            processes hold alike is written by the first, rows by whoever holds them.
        state: whatever else resuming needs, JSON-able with string keys; tuples come back as lists.
        keep: how many valid checkpoints stay; None keeps all.

    Raises:
        StorageFault: the disk of any process is full or refuses; every older checkpoint is still valid.
    """
    final = folder / f"step-{step:08d}"
    try:
        writing.write(final, step, parts, state)
    except (OSError, SafetensorError, StorageFault) as error:
        older = "checkpoints written before are intact" if any(_numbered(folder)) else "there is no older one"
        raise StorageFault(
            f"the checkpoint of step {step} could not be written to {folder}: {reason(error)}\n"
            f"{older}; make room, then: vtp resume {folder.parent}"
        ) from error
    if keep is not None:
        writing.everywhere(lambda: _prune(folder, keep, step) if distributed.rank() == 0 else None)
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
    files, named = manifest.read(path), _by_part(path)
    wanted = list(named) if only is None else list(only)
    if missing := [part for part in wanted if part not in named]:
        raise StorageFault(f"{path} has no part {missing[0]!r}; it has {', '.join(sorted(named))}")
    for name in ["state.json", *(name for part in wanted for name in named[part])]:
        manifest.check(path / name, files[name], verify)
    try:
        parts = {part: _whole(path, named[part]) for part in wanted}
        state: dict[str, Any] = json.loads(read(path / "state.json"))
    except (OSError, SafetensorError, ValueError) as error:
        raise manifest.broken(path, str(error)) from error
    return parts, state


def _by_part(path: Path) -> dict[str, list[str]]:
    """Names of each part's files."""
    named: dict[str, list[str]] = {}
    for name, entry in manifest.read(path).items():
        if "part" in entry:
            named.setdefault(entry["part"], []).append(name)
    return named


def _whole(path: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of one part, in the order of a part that one process wrote."""
    if len(names) == 1:
        return load_file(path / names[0])
    saved = Saved([path / name for name in names])
    return {name: saved[name] for name in sorted(saved)}


def opened(path: Path) -> dict[str, Saved]:
    """The parts of a checkpoint, of which nothing is read yet; who holds rows of a tensor reads no others.

    Raises:
        StorageFault: the checkpoint is broken or of a newer format. Sizes are compared; :func:`verify` hashes.
    """
    for name, entry in manifest.read(path).items():
        manifest.check(path / name, entry, False)
    try:
        return {part: Saved([path / name for name in names]) for part, names in _by_part(path).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise manifest.broken(path, str(error)) from error


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
        if path.name.startswith(ASIDE):
            final = folder / path.name.removeprefix(ASIDE)
            if not final.exists():
                path.rename(final)  # killed between the two renames of a replacement
                continue
        elif not path.name.startswith(PARTIAL):
            continue
        remove(path)
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
    remove(doomed)
    path.rename(doomed)
    remove(doomed)
