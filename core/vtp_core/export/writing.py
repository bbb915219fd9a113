"""``vtp export``: one function a format, and the writer that makes two exports of one run the same bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vtp_core.errors import StackFault, StorageFault, suggestion
from vtp_core.export import native
from vtp_core.export.card import model_card, shown_stack
from vtp_core.export.source import Source, check_weights, read_source
from vtp_core.official.config import FILE as CONFIG
from vtp_core.official.reading import STATISTICS, WEIGHTS
from vtp_core.official.writing import to_official
from vtp_core.run import manifest
from vtp_core.run.files import PARTIAL, reason, replace, sync_folder

CARD = "README.md"
Tensors = Mapping[str, Tensor]
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of an export.

    Attributes:
        tensors: by file.
        names: of the texts.
        texts: made from what describes the files of tensors; the last one completes the export.
        kept: files as they are.
    """

    tensors: dict[str, Tensors]
    names: tuple[str, ...]
    texts: Callable[[Entries], dict[str, str]]
    kept: dict[str, bytes]

    @property
    def files(self) -> set[str]:
        return {*self.tensors, *self.names, *self.kept}


def export(
    run: Path, out: Path, format: str, weights: str = "student", statistics: Path | None = None
) -> list[str]:
    """Write an export.

    Args:
        run: a run, an export or an official VTP directory.
        out: a new or empty folder, or one that the same format was exported to.
        format: a key of :data:`FORMATS`.
        weights: ``student`` or ``ema``.
        statistics: a folder that ``vtp latents`` wrote, whose statistics come along.

    Returns:
        Lines on what should be known.

    Raises:
        StackFault: an unknown format, or a tokenizer that the format cannot express.
        DataFault: nothing loadable is there.
        StorageFault: the folder holds other things, or cannot be written.
    """
    if format not in FORMATS:
        raise StackFault(f"format: no {format!r}{suggestion(format, FORMATS)}")
    check_weights(weights)
    if out.resolve() == run.resolve():
        raise StorageFault(f"{out} is what is exported; -o names another folder")
    source = read_source(run, weights, statistics)
    notes = _notes(source, format)
    plan = FORMATS[format](source, notes)
    _claim(out, plan.files | _BESIDE)
    entries = {name: _saved(out / name, held) for name, held in sorted(plan.tensors.items())}
    texts = {name: text.encode() for name, text in plan.texts(entries).items()}
    for name, raw in {**plan.kept, **texts}.items():
        replace(out / name, raw)
    _drop(out, plan.files)
    return notes


def _native(source: Source, notes: list[str]) -> Plan:
    """``model.safetensors`` and a file for every other part."""
    files = {_file(part): part for part in source.parts}
    official = {} if source.base is None else source.base.fields()

    def texts(entries: Entries) -> dict[str, str]:
        named = {name: {"part": files[name], **entry} for name, entry in entries.items()}
        card = _card(source, notes, 'Tokenizer.from_pretrained("this directory")')
        config = native.config_text(
            source.stack.name, source.weights, source.step, source.data, named, official
        )
        return {"stack.yaml": shown_stack(source.stack), CARD: card, native.CONFIG: config}

    tensors: dict[str, Tensors] = {name: source.parts[part] for name, part in files.items()}
    return Plan(tensors, ("stack.yaml", CARD, native.CONFIG), texts, source.texts)


def _file(part: str) -> str:
    return WEIGHTS if part == "tokenizer" else quote(part.replace("/", "."), safe="") + ".safetensors"


def _vtp(source: Source, notes: list[str]) -> Plan:
    """The layout of the VTP release."""
    config, state = to_official(source.stack, source.parts, source.base)
    tensors: dict[str, Tensors] = {WEIGHTS: state}
    if "statistics" in source.parts:
        tensors[STATISTICS] = source.parts["statistics"]
    card = _card(
        source, notes, 'Tokenizer.from_pretrained("this directory")  # or the release\'s own VTPModel'
    )
    texts = {CARD: card, CONFIG: config.text()}
    return Plan(tensors, tuple(texts), lambda entries: texts, {})


FORMATS: dict[str, Callable[[Source, list[str]], Plan]] = {"native": _native, "vtp": _vtp}
_BESIDE = {STATISTICS, WEIGHTS, "names.json", "probes.jsonl"}


def _notes(source: Source, format: str) -> list[str]:
    lines = []
    if "statistics" not in source.parts:
        lines.append(
            "without latent statistics: vtp latents computes them, and --statistics takes them along"
        )
    node = source.stack.config.get("encoder") or {}
    if format == "vtp" and node.get("rope_dtype", "float32") == "float32":
        lines.append(
            "trained with rotary positions in float32, which config.json says in rope_dtype; the release's own class "
            "does not read that and rounds queries and keys to bfloat16, so its outputs differ by some 1e-3"
        )
    return lines


def _card(source: Source, notes: list[str], load: str) -> str:
    weights = "the EMA's" if source.weights == "ema" else "the student's"
    origin = "From the VTP release." if source.base else f"Weights: {weights}, of step {source.step}."
    return model_card(
        source.stack, source.parts, origin=origin, load=f"from vtp_core import Tokenizer\n\ntok = {load}",
        data=source.data, rows=source.rows, released=source.base is not None, notes=notes,
    )  # fmt: skip


# ---- files


def _claim(out: Path, ours: set[str]) -> None:
    """Make the folder; one that holds anything but an earlier export is left alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(PARTIAL))
    except OSError as error:
        raise StorageFault(f"{out} cannot be made: {reason(error)}; -o names another place") from error
    others = [name for name in found if name not in ours] if {WEIGHTS, CONFIG} <= set(found) else found
    if others:
        raise StorageFault(f"{out} is not empty (it has {others[0]}); -o names a new folder")


def _drop(out: Path, written: set[str]) -> None:
    """Remove what an earlier export left and this one has not."""
    for entry in out.iterdir():
        if entry.name not in written and (entry.is_file() or entry.is_symlink()):
            entry.unlink()


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
