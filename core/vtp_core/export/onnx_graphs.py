"""Encoder and decoder of a tokenizer as ONNX graphs that say nothing of where and when they were made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.errors import StackFault
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.objective import Objective

OPSET = 20
ROWS = 2  # of the batch that is traced; any number may be run
_PASSED = ("Cast", "Constant")


class Encoding(nn.Module):
    """Images in [0, 1] to everything that the encoder's graph gives, in the order of ``outputs``.

    Args:
        tokenizer: whose encoder it is.
        embedder: the objective that exports ``embed_image``, or None.
    """

    def __init__(self, tokenizer: Tokenizer, embedder: Objective | None) -> None:
        super().__init__()
        self.encoder, self.bottleneck, self.embedder = tokenizer.encoder, tokenizer.bottleneck, embedder
        self.model = tokenizer.model
        self.outputs = ("latent", *(["standardized"] if tokenizer.statistics else []), "cls", "patches")
        self.outputs += ("embedding",) if embedder is not None else ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.model.modality.normalise(images)
        found = self.encoder(x, want={"cls": x.shape[0], "patches": x.shape[0]})
        made = self.bottleneck(found["patches"])
        grid = [s // p for s, p in zip(x.shape[2:], self.model.spec.patch, strict=True)]
        z = made["carried"].transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, h, w)
        given = {**found, "latent": z, "standardized": self.model.standardise(z)}
        if self.embedder is not None:
            cls = self.bottleneck(found["cls"][:, None])["latent"][:, 0]
            features = {**found, "latent": made["latent"], "latent.cls": cls}
            embedder: Any = self.embedder
            given["embedding"] = embedder.embed_image(features)
        return tuple(given[name] for name in self.outputs)


class Decoding(nn.Module):
    """Latents, standardised where there are statistics, to images in [0, 1], not clamped.

    Args:
        tokenizer: whose decoder it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.decoder, self.model = tokenizer.decoder, tokenizer.model
        self.input = "standardized" if tokenizer.statistics else "latent"

    def forward(self, z: Tensor) -> Tensor:
        shown: Tensor = self.model.modality.to_display(self.decoder(self.model.restore(z))["decoded"])
        return shown


def graph_of(
    module: nn.Module, example: Tensor, inputs: str, outputs: tuple[str, ...], what: str
) -> tuple[Any, bool]:
    """The graph of a module, an ``onnx_ir.Model``, over batches of any size; and whether it rounds to bfloat16.

    Args:
        module: has computed ``example`` once, so that its tables are made.
        example: of :data:`ROWS` rows.
        inputs: name of its input.
        outputs: names of its outputs.
        what: names the module in messages.

    Raises:
        StackFault: torch cannot trace it, or has no ONNX operator for something in it.
    """
    batch = torch.export.Dim("batch", min=1)
    try:
        # strict: the other way takes len(x) for a constant
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=True)
        made = torch.onnx.export(
            program, (), dynamo=True, input_names=[inputs], output_names=list(outputs), opset_version=OPSET,
            verbose=False,
        )  # fmt: skip
    except Exception as error:  # of many kinds, from every layer of torch.export
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StackFault(
            f"--format onnx: torch cannot make a graph of {what}: {why[:300]}\n"
            "its code must be traceable by torch.export.export(..., strict=True) with a batch of any size"
        ) from error
    assert made is not None
    rounds = widen(made.model)
    strip(made.model)
    return made.model, rounds


def widen(model: Any) -> bool:
    """Compute in float32 what is bfloat16, rounding each result: onnxruntime has few bfloat16 kernels for CPUs.

    The rotation of released VTP weights is rounded so; the results are those of bfloat16 operators.

    Returns:
        Whether there was anything.
    """
    import onnx_ir as ir

    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def cast(value: Any, to: Any, name: str) -> Any:
        made = ir.Node("", "Cast", [value], [ir.AttrInt64("to", to.value)], name=name)
        made.outputs[0].name, made.outputs[0].dtype, made.outputs[0].shape = name, to, value.shape
        return made

    graph, found = model.graph, False
    for node in list(graph):
        if node.op_type in _PASSED:
            continue
        found = found or any(v is not None and v.dtype == narrow for v in (*node.inputs, *node.outputs))
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == narrow:
                wider = cast(value, wide, f"{node.name}_wide_{index}")
                graph.insert_before(node, wider)
                node.replace_input_with(index, wider.outputs[0])
        for index, value in enumerate(node.outputs):
            if value.dtype == narrow:
                users = list(value.uses())
                rounded = cast(value, narrow, f"{node.name}_rounded_{index}")
                value.dtype = wide
                graph.insert_after(node, rounded)
                for user, place in users:
                    user.replace_input_with(place, rounded.outputs[0])
    return found


def strip(model: Any) -> None:
    """Take out what differs between machines and checkouts: stack traces, names of scopes, comments."""
    graph = model.graph
    for held in (model, graph, *model.functions.values()):
        held.metadata_props.clear()
        held.doc_string = None
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
