"""``--format onnx``: the graphs of encoder and decoder, compared with torch in onnxruntime before they are believed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.build import blueprint
from vtp_core.errors import StackFault
from vtp_core.export import foreign_config
from vtp_core.export.card import card_of, table
from vtp_core.export.diffusers_reading import check_images
from vtp_core.export.onnx_graphs import ROWS, Decoding, Encoding, graph_of
from vtp_core.export.onnx_session import FORMAT, check_installed, run
from vtp_core.export.plan import Entries, Plan
from vtp_core.export.source import Source
from vtp_core.exporters import exporters_of
from vtp_core.state import loaded_tokenizer
from vtp_core.statistics import digest, hexed
from vtp_core.tokenizer import Tokenizer, bare
from vtp_plugins.objective import Objective

ENCODER, DECODER, CARD = "encoder.onnx", "decoder.onnx", "README.md"
LARGEST = 1 << 30
"""Bytes of weights inside a graph; more lie beside it, for a file of protobuf ends at 2 GB."""
TOLERANCE = {False: 1e-3, True: 4e-3}
"""Largest difference from torch, by norm; more where it rounds to bfloat16, as one rounding the other way is 4e-3."""
_USE = """import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
{outputs} = encoder.run(None, {{"images": images}})  # float32 (B, 3, {size}) in [0, 1]"""
_DECODE = """
decoder = onnxruntime.InferenceSession("decoder.onnx")
(image,) = decoder.run(None, {{"{input}": {input}}})  # in [0, 1], not clamped"""


@dataclass(slots=True)
class _Drawing:
    """One graph: its module, what goes in, and after it is drawn how far onnxruntime is from torch."""

    module: nn.Module
    example: Tensor
    inputs: str
    outputs: tuple[str, ...]
    shapes: dict[str, list[int]] = field(default_factory=dict)
    error: float = 0.0

    @property
    def beside(self) -> bool:
        """Whether the weights lie beside the graph."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters()) > LARGEST

    def config(self) -> dict[str, Any]:
        """Of ``config.json``: shapes with 0 for the batch."""
        inputs = {self.inputs: [0, *self.example.shape[1:]]}
        return {"inputs": inputs, "outputs": self.shapes, "error": self.error}


def onnx_plan(source: Source, notes: list[str]) -> Plan:
    """What ``--format onnx`` writes; the graphs are made when the folder is there.

    Raises:
        StackFault: a library is missing, or the tokenizer is none of images.
    """
    check_installed()
    tokenizer, embedder = _tokenizer(source)
    drawings = _drawings(tokenizer, embedder)
    left = [name for name in source.parts if name.startswith(("generator", "objectives/", "exports/"))]
    if embedder is not None:
        notes.append("texts are not embedded by a graph: the tokenizer's embed_text stays with vtp_core")
    elif left:
        notes.append(f"left out: {', '.join(left)}")

    def draw(folder: Path) -> None:
        for name, drawing in drawings.items():
            _draw(folder / name, drawing)
        errors = ", ".join(f"{name} {drawing.error:.0e}" for name, drawing in drawings.items())
        notes.append(
            f"onnxruntime agrees with torch, by the norm of the difference over that of the value: {errors}"
        )

    def texts(entries: Entries) -> dict[str, str]:
        config = {
            "model_type": foreign_config.ONNX,
            "format": FORMAT,
            "name": source.stack.name,
            "weights": source.weights,
            "step": source.step,
            "data": source.data,
            "tokenizer": hexed(digest(source.parts["tokenizer"])),
            "image_size": list(tokenizer.spec.size),
            "graphs": {name: drawing.config() for name, drawing in drawings.items()},
            "files": dict(sorted(entries.items())),
        }
        card = card_of(source, notes, _use(tokenizer, drawings), _files(drawings))
        return {CARD: card, foreign_config.FILE: json.dumps(config, indent=2) + "\n"}

    drawn = [name for name, drawing in drawings.items()]
    drawn += [f"{name}.data" for name, drawing in drawings.items() if drawing.beside]
    return Plan(ENCODER, {}, (CARD, foreign_config.FILE), texts, {}, tuple(drawn), draw)


def _tokenizer(source: Source) -> tuple[Tokenizer, Objective | None]:
    """The tokenizer, and the objective that embeds its images."""
    model = loaded_tokenizer(blueprint(bare(source.stack)), source.parts["tokenizer"])
    check_images(model)
    model.statistics = dict(source.parts.get("statistics", {}))
    kept = {name: part for name, part in source.parts.items() if name.startswith(("objectives/", "exports/"))}
    exporters = exporters_of(source.stack, kept, "cpu") if kept else {}
    embedder = next((found for found in exporters.values() if "embed_image" in found.exports), None)
    return Tokenizer(model).float().eval().requires_grad_(False), embedder


def _drawings(tokenizer: Tokenizer, embedder: Objective | None) -> dict[str, _Drawing]:
    drawn = torch.Generator().manual_seed(0)
    encoding = Encoding(tokenizer, embedder).eval()
    images = torch.rand(ROWS, tokenizer.spec.signal_channels, *tokenizer.spec.size, generator=drawn)
    found = {ENCODER: _Drawing(encoding, images, "images", encoding.outputs)}
    if hasattr(tokenizer, "decoder"):
        decoding = Decoding(tokenizer).eval()
        z = torch.randn(ROWS, tokenizer.spec.channels, *tokenizer.spec.grid, generator=drawn)
        found[DECODER] = _Drawing(decoding, z, decoding.input, ("image",))
    return found


@torch.no_grad()
def _draw(file: Path, drawing: _Drawing) -> None:
    """Write a graph and compare it with torch.

    Raises:
        StackFault: it cannot be made, or differs from torch by more than :data:`TOLERANCE`.
    """
    import onnx_ir as ir

    wanted = _outputs(drawing.module, drawing.example)  # which makes the tables that the trace takes up
    graph, rounds = graph_of(drawing.module, drawing.example, drawing.inputs, drawing.outputs, file.name)
    ir.save(graph, file, external_data=f"{file.name}.data" if drawing.beside else None)
    drawing.shapes = {
        name: [0, *value.shape[1:]] for name, value in zip(drawing.outputs, wanted, strict=True)
    }
    more = torch.cat([drawing.example.flip(0), drawing.example[:1]])  # another number of rows
    for example, aims in ((drawing.example, wanted), (more, _outputs(drawing.module, more))):
        found = run(file, {drawing.inputs: example.numpy()}, torch.get_num_threads())
        for name, aim in zip(drawing.outputs, aims, strict=True):
            off = _off(torch.from_numpy(found[name]), aim)
            if not off <= TOLERANCE[rounds]:
                raise StackFault(
                    f"--format onnx: {file.name}: {name} differs from torch by {off:.1e} of its norm, more than "
                    f"{TOLERANCE[rounds]:.0e}; nothing was written"
                )
            drawing.error = max(drawing.error, float(f"{off:.0e}"))


def _outputs(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    found = module(x)
    return found if isinstance(found, tuple) else (found,)


def _off(found: Tensor, aim: Tensor) -> float:
    """Norm of the difference over the norm of the aim."""
    return float((found.double() - aim.double()).norm() / aim.double().norm().clamp(min=1e-12))


def _use(tokenizer: Tokenizer, drawings: dict[str, _Drawing]) -> str:
    size = ", ".join(map(str, tokenizer.spec.size))
    text = _USE.format(outputs=", ".join(drawings[ENCODER].outputs), size=size)
    return text + (_DECODE.format(input=drawings[DECODER].inputs) if DECODER in drawings else "")


def _files(drawings: dict[str, _Drawing]) -> list[str]:
    """What goes in and out of each graph, for the card."""
    rows = []
    for name, drawing in drawings.items():
        told = drawing.config()
        for way, shapes in (("in", told["inputs"]), ("out", told["outputs"])):
            for what, shape in shapes.items():
                rows.append((name, way, what, f"B x {' x '.join(map(str, shape[1:]))}", _MEANINGS[what]))
    errors = ", ".join(f"{name} {drawing.error:.0e}" for name, drawing in drawings.items())
    return [
        *table(("file", "", "name", "float32", "meaning"), rows),
        "",
        f"B is any number. Norm of onnxruntime's difference from torch over that of the value: {errors}.",
    ]


_MEANINGS = {
    "images": "in [0, 1]",
    "latent": "raw",
    "standardized": "(latent - mean) / std, which generators see",
    "cls": "features after the final norm",
    "patches": "features after the final norm",
    "embedding": "unit vectors, to be compared with embed_text",
    "image": "in [0, 1], not clamped",
}
