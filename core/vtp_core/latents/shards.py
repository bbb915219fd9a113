"""Files of latents: written whole, and kept by a later write of the very same latents."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtp_core.data.manifest import sha256
from vtp_core.errors import StackFault
from vtp_core.latents.manifest import Shard
from vtp_core.run.files import PARTIAL, sync_folder


def number_tensor(field_name: str) -> str:
    """The tensor of an integer field in a shard; -1 stands for none."""
    return "labels" if field_name == "label" else f"fields/{field_name}"


def publish(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Write a shard under another name, then rename it: it is whole or absent.

    Args:
        path: of the shard.
        tensors: by name.
        key: of the protocol; its only metadata, as safetensors writes several in no fixed order.
    """
    handle, name = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, {"key": key})
        temporary.chmod(path.parent.stat().st_mode & 0o666)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def entry(path: Path) -> Shard:
    """A shard as the manifest describes it."""
    with safe_open(path, "pt") as shard:
        samples = shard.get_slice("labels").get_shape()[0]
    return Shard(path.name, samples, path.stat().st_size, sha256(path))


def same(folder: Path, shard: Shard) -> bool:
    """Whether a shard is there, by its size."""
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes


def kept(path: Path, key: str, known: Shard | None) -> bool:
    """Whether a shard need not be written.

    Args:
        path: of the shard.
        key: of the protocol that is being written.
        known: what a manifest says of it, if the write was finished once.

    Raises:
        StackFault: it holds other latents.
    """
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as shard:
            theirs = (shard.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return False  # cut off
    if theirs != key:
        raise StackFault(
            f"{path} is of an unfinished write with other settings or another tokenizer; give another -o, or "
            f"remove {path.parent} first"
        )
    return known is None or known.sha256 == sha256(path)
