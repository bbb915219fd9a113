"""The folder of an export: what may lie there, and files that come at once or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vtp_core.errors import StorageFault
from vtp_core.export.plan import Entries, Plan, Tensors
from vtp_core.official.config import FILE as CONFIG
from vtp_core.run import manifest
from vtp_core.run.files import PARTIAL, reason, replace, sync_folder


def claim(out: Path, plan: Plan, beside: set[str]) -> None:
    """Make the folder; one that holds anything but an earlier export is left alone.

    Args:
        out: the folder.
        plan: what is to be written there.
        beside: what another export of the same format may have held.

    Raises:
        StorageFault: it holds other things, or cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(PARTIAL))
    except OSError as error:
        raise StorageFault(f"{out} cannot be made: {reason(error)}; -o names another place") from error
    ours = plan.files | beside
    others = [name for name in found if name not in ours] if {plan.main, CONFIG} <= set(found) else found
    if others:
        raise StorageFault(f"{out} is not empty (it has {others[0]}); -o names a new folder")


def write(out: Path, plan: Plan) -> None:
    """Write the files of an export, and remove what an earlier one left and this one has not.

    Raises:
        StorageFault: a file cannot be written.
    """
    entries = {name: _saved(out / name, held) for name, held in sorted(plan.tensors.items())}
    entries |= _drawn(out, plan)
    texts = {name: text.encode() for name, text in plan.texts(entries).items()}
    for name, raw in {**plan.kept, **texts}.items():
        replace(out / name, raw)
    for entry in out.iterdir():
        if entry.name not in plan.files and (entry.is_file() or entry.is_symlink()):
            entry.unlink()


def _drawn(out: Path, plan: Plan) -> Entries:
    if plan.draw is None:
        return {}
    entries = {}
    try:
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=out) as folder:
            plan.draw(Path(folder))
            for name in plan.drawn:
                entries[name] = manifest.seal(Path(folder) / name, out.stat().st_mode)
                os.replace(Path(folder) / name, out / name)
        sync_folder(out)
    except OSError as error:
        raise StorageFault(f"{out} could not be written: {reason(error)}") from error
    return entries


def _saved(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Write tensors at once, and describe the file."""
    handle, temporary = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(_apart(held), temporary, metadata={"format": "pt"})
        entry = manifest.seal(Path(temporary), path.parent.stat().st_mode)
        os.replace(temporary, path)
        sync_folder(path.parent)
        return entry
    except (OSError, SafetensorError) as error:
        raise StorageFault(f"{path} could not be written: {reason(error)}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory; those that fill a part of some file's are told apart by address."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.numel() and value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    return tensors
