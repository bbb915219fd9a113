"""``vtp export``: a run, one of several formats, and a folder; two exports of one run are the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from vtp_core.errors import StackFault, StorageFault, suggestion
from vtp_core.export import native
from vtp_core.export.card import card_of, shown_stack
from vtp_core.export.diffusers_writing import diffusers_plan
from vtp_core.export.folder import claim, write
from vtp_core.export.onnx_writing import onnx_plan
from vtp_core.export.plan import Entries, Plan, Tensors
from vtp_core.export.source import Source, check_weights, read_source
from vtp_core.official.config import FILE as CONFIG
from vtp_core.official.reading import STATISTICS, WEIGHTS
from vtp_core.official.writing import to_official
from vtp_plugins.registry import Registry

CARD = "README.md"
_USE = 'from vtp_core import Tokenizer\n\ntok = Tokenizer.from_pretrained("this directory")'
_BESIDE = {STATISTICS, WEIGHTS, "names.json", "probes.jsonl", "encoder.onnx.data", "decoder.onnx.data"}


def export(
    run: Path, out: Path, format: str, weights: str = "student", statistics: Path | None = None,
    registry: Registry | None = None,
) -> list[str]:  # fmt: skip
    """Write an export.

    Args:
        run: a run, an export or an official VTP directory.
        out: a new or empty folder, or one that the same format was exported to.
        format: a key of :data:`FORMATS`.
        weights: ``student`` or ``ema``.
        statistics: a folder that ``vtp latents`` wrote, whose statistics come along.
        registry: what names mean; by default what is installed.

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
    source = read_source(run, weights, statistics, registry)
    notes = _notes(source, format)
    plan = FORMATS[format](source, notes)
    claim(out, plan, _BESIDE)
    write(out, plan)
    return notes


def _native(source: Source, notes: list[str]) -> Plan:
    """``model.safetensors`` and a file for every other part."""
    files = {_file(part): part for part in source.parts}
    official = {} if source.base is None else source.base.fields()

    def texts(entries: Entries) -> dict[str, str]:
        named = {name: {"part": files[name], **entry} for name, entry in entries.items()}
        card = card_of(source, notes, _USE)
        config = native.config_text(
            source.stack.name, source.weights, source.step, source.data, named, official
        )
        return {"stack.yaml": shown_stack(source.stack), CARD: card, native.CONFIG: config}

    tensors: dict[str, Tensors] = {name: source.parts[part] for name, part in files.items()}
    return Plan(WEIGHTS, tensors, ("stack.yaml", CARD, native.CONFIG), texts, source.texts)


def _file(part: str) -> str:
    return WEIGHTS if part == "tokenizer" else quote(part.replace("/", "."), safe="") + ".safetensors"


def _vtp(source: Source, notes: list[str]) -> Plan:
    """The layout of the VTP release."""
    config, state = to_official(source.stack, source.parts, source.base)
    tensors: dict[str, Tensors] = {WEIGHTS: state}
    if "statistics" in source.parts:
        tensors[STATISTICS] = source.parts["statistics"]
    texts = {CARD: card_of(source, notes, f"{_USE}  # or the release's own VTPModel"), CONFIG: config.text()}
    return Plan(WEIGHTS, tensors, tuple(texts), lambda entries: texts, {})


FORMATS: dict[str, Callable[[Source, list[str]], Plan]] = {
    "native": _native, "vtp": _vtp, "diffusers": diffusers_plan, "onnx": onnx_plan,
}  # fmt: skip


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
