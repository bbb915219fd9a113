"""Towers that people bring as files: where they lie, what they are held to, and how they come there."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from vtp_core.errors import DataFault, StackFault
from vtp_core.weights_files import copy, pin, pinned, place, root, sha256
from vtp_core.weights_towers import TOWERS, Library, Tower

State = Literal["ready", "missing", "broken", "unpinned"]
LIBRARIES: tuple[Library, ...] = ("timm", "open_clip")
_NAMED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
"""Publishers put the first digits of a file's sha256 behind its name, as torch.hub reads them."""


def find(name: str) -> Tower | None:
    """The row of a name: the table's, or what timm or open_clip know of it; None where they don't.

    Names of timm without a tag mean its default weights; see :func:`full_name`.
    """
    if name in TOWERS:
        return TOWERS[name]
    import timm

    if timm.is_model(name):
        try:
            found = timm.get_pretrained_cfg(name)
        except RuntimeError:  # an unknown tag
            return None
        licence = (found.license if found else "") or "unknown"
        return Tower("timm", "others", (found.hf_hub_id if found else "") or f"timm/{name}", licence, 0)
    try:
        import open_clip
    except ImportError:
        return None
    model, _, tag = name.partition(".")
    if model not in open_clip.list_models():
        return None
    hub = (open_clip.get_pretrained_cfg(model, tag) or {}).get("hf_hub", "") if tag else ""
    return Tower("open_clip", "others", str(hub).rstrip("/"), "unknown", 0)


def full_name(library: Library, name: str) -> str:
    """The name that a file has: with the tag of the weights, of which timm knows the default."""
    if library == "open_clip" or "." in name:
        return name
    import timm

    found = timm.get_pretrained_cfg(name)
    return f"{name}.{found.tag}" if found and found.tag else name


def place_of(library: Library, name: str) -> Path:
    """Where a tower's file belongs, whether it is there or not."""
    return root() / library / f"{full_name(library, name).replace('/', '-')}.safetensors"


def state_of(file: Path, hashed: bool) -> State:
    """State of a tower's file, by its hash or only by what lies there."""
    if not file.is_file():
        return "missing"
    expected = pinned(file)
    if expected is None:
        return "unpinned"
    return "ready" if not hashed or sha256(file) == expected else "broken"


def path(library: Library, name: str) -> Path:
    """The file of a tower, as it was imported; hashed once a process.

    Raises:
        DataFault: it isn't here or isn't what was imported; the message ends with the command that brings it.
    """
    file = place_of(library, name)
    state = state_of(file, hashed=True)
    if state == "ready":
        return file
    why = {
        "missing": f"are not at {file}",
        "unpinned": f"at {file} were put there unchecked; vtp weights import {full_name(library, name)} checks them",
        "broken": f"at {file} are broken: the file is not the one that was imported",
    }[state]
    raise DataFault(f"weights {full_name(library, name)!r} of {library} {why}. {remedy(library, name)}")


def remedy(library: Library, name: str) -> str:
    """The commands that bring a tower, as the last words of a message."""
    name = full_name(library, name)
    row = TOWERS.get(name)
    source = (
        f"Get {row.file} of {row.hub} (Hugging Face hub, {row.licence})" if row else f"Get {library}'s file"
    )
    other = f" or {row.original}" if row and row.original else ""
    return f"{source}{other}\nand run:\n  vtp weights import {name} --from FILE"


def import_(row: Tower, name: str, source: Path | None) -> Path:
    """Check a tower's file against its network, and put it where teachers and encoders look.

    A safetensors file in its library's layout is kept as it is, so that its hash stays the publisher's.

    Raises:
        DataFault: there is no file, it is not the published one, or it is broken.
        Mismatch: its tensors are not the network's.
    """
    from vtp_core.weights_fitting import fitted

    name = full_name(row.library, name)
    target = place_of(row.library, name)
    state = state_of(target, hashed=True)
    if source is None and state == "ready":
        return target
    if source is None and state == "unpinned":
        source = target
    if source is None or not source.is_file():
        what = "no package carries them" if source is None else f"there is no file {source}"
        raise DataFault(f"weights {name!r}: {what}. {remedy(row.library, name)}")
    _check_published(row, name, source)
    tensors = fitted(row.library, name, source)
    if tensors is None:
        copy(source, target)
    else:
        from safetensors.torch import save_file

        place(target, lambda made: save_file(tensors, made, metadata={"format": "pt"}))
    pin(target)
    return target


def present() -> Iterator[tuple[Library, str]]:
    """Towers beyond the table whose files are here."""
    for library in LIBRARIES:
        for file in sorted((root() / library).glob("*.safetensors")):
            if file.stem not in TOWERS:
                yield library, file.stem


def check_name(name: str) -> Tower:
    """The row of a name.

    Raises:
        StackFault: neither the table nor a library knows it.
    """
    row = find(name)
    if row is None:
        near = difflib.get_close_matches(name, TOWERS, n=1, cutoff=0.6)
        told = f"; did you mean {near[0]!r}?" if near else ""
        raise StackFault(f"no weights named {name!r}{told}; `vtp weights list` shows all")
    return row


def _check_published(row: Tower, name: str, source: Path) -> None:
    """Hold a file to the hash that its publisher gave, where one is known."""
    said = _NAMED.search(source.name)
    expected = row.original_sha256 if source.name == row.original else said[1] if said else ""
    digest = sha256(source) if expected else ""
    if not digest.startswith(expected):
        raise DataFault(
            f"weights {name!r}: {source} has sha256 {digest}, but the published one begins with {expected[:16]}: "
            f"it is broken or another file, and was not read. {remedy(row.library, name)}"
        )
