"""Names and rows of published towers and of RAE's decoder, against those of our modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of ours and those of theirs that it holds, one below the other.

    Attributes:
        ours: its name.
        theirs: their names.
        shape: of each of theirs.
        view: shape of ours; None is theirs, stacked.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None

    def to_ours(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensor out of theirs."""
        joined = torch.cat([tensors[name] for name in self.theirs])
        return joined if self.view is None else joined.reshape(self.view)

    def to_theirs(self, tensor: Tensor) -> dict[str, Tensor]:
        """The inverse."""
        parts = tensor.reshape(len(self.theirs) * self.shape[0], *self.shape[1:]).chunk(len(self.theirs))
        return {name: part.clone() for name, part in zip(self.theirs, parts, strict=True)}


@dataclass(frozen=True, slots=True)
class Tower:
    """Names of a vision transformer of ``transformers``.

    Attributes:
        sign: a name that only this layout has.
        layer: prefix of a layer, before its number.
        attention: query, key, value and output of a layer.
        inner: our name -> theirs of what a layer has besides.
        outer: our name -> theirs of what stands outside of the layers.
        positions: name of the position table.
        registers: name of the register tokens, which have no positions; empty without.
        elsewhere: beginnings of names that belong to others: heads, decoders, the final norm.
        models: timm's name by width; the widest that is not wider tells.
        signed: whether pictures are read in [-1, 1].
        eps: of the norms, where it is not timm's.
    """

    sign: str
    layer: str
    attention: tuple[str, str, str, str]
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    positions: str
    registers: str
    elsewhere: tuple[str, ...]
    models: Mapping[int, str]
    signed: bool = False
    eps: float | None = None


_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_EMBEDDINGS = "embeddings.patch_embeddings.projection"
_BERT = (
    "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense",
)  # fmt: skip

DINOV2 = Tower(
    sign="encoder.layer.0.layer_scale1.lambda1",
    layer="encoder.layer.",
    attention=_BERT,
    inner={
        "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    },
    outer={"cls_token": "embeddings.cls_token", "patch_embed.proj": _EMBEDDINGS},
    positions="embeddings.position_embeddings",
    registers="embeddings.register_tokens",
    elsewhere=("embeddings.mask_token", "layernorm.", "pooler.", "classifier."),
    models={384: "vit_small", 768: "vit_base", 1024: "vit_large"},
)  # fmt: skip
MAE = Tower(
    sign="encoder.layer.0.layernorm_before.weight",
    layer="encoder.layer.",
    attention=_BERT,
    inner={
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
    outer={"cls_token": "embeddings.cls_token", "patch_embed.proj": _EMBEDDINGS},
    positions="embeddings.position_embeddings",
    registers="",
    elsewhere=("layernorm.", "pooler."),
    models={768: "vit_base_patch16_224.mae", 1024: "vit_large_patch16_224.mae", 1280: "vit_huge_patch14_224.mae"},
    eps=1e-12,
)  # fmt: skip
SIGLIP = Tower(
    sign="encoder.layers.0.self_attn.q_proj.weight",
    layer="encoder.layers.",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    inner={"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    outer={"patch_embed.proj": "embeddings.patch_embedding"},
    positions="embeddings.position_embedding.weight",
    registers="",
    elsewhere=("post_layernorm.", "head."),
    models={
        768: "vit_base_patch16_siglip_256.v2_webli", 1024: "vit_large_patch16_siglip_256.v2_webli",
        1152: "vit_so400m_patch16_siglip_256.v2_webli",
    },
    signed=True,
)  # fmt: skip
TOWERS = {"dinov2": DINOV2, "mae": MAE, "siglip": SIGLIP}


def tower_parts(tower: Tower, shapes: Shapes, depth: int) -> Iterator[Part]:
    """Every tensor of a tower but positions and registers; shapes of vectors follow from the matrices'."""
    for ours, theirs in tower.outer.items():
        yield from _pair(ours, theirs, shapes)
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"{tower.layer}{index}."
        query, key, value, out = (theirs + name for name in tower.attention)
        yield from _rows(f"{ours}attn.qkv", (query, key, value), shapes)
        yield from _rows(f"{ours}attn.proj", (out,), shapes)
        for name, other in tower.inner.items():
            yield from _pair(ours + name, theirs + other, shapes)


def decoder_parts(shapes: Shapes, depth: int) -> Iterator[Part]:
    """Every tensor of RAE's decoder but its table of positions."""
    yield Part("token", ("trainable_cls_token",), shapes["trainable_cls_token"])
    outer = {"proj_in": "decoder_embed", "norm": "decoder_norm", "proj_out": "decoder_pred"}
    for ours, theirs in outer.items():
        yield from _rows(ours, (theirs,), shapes)
    inner = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "proj": "attention.output.dense",
        "fc1": "intermediate.dense", "fc2": "output.dense",
    }  # fmt: skip
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"decoder_layers.{index}."
        query, key, value, _ = (theirs + name for name in _BERT)
        yield from _rows(f"{ours}qkv", (query, key, value), shapes)
        for name, other in inner.items():
            yield from _rows(ours + name, (theirs + other,), shapes)


def _pair(ours: str, theirs: str, shapes: Shapes) -> Iterator[Part]:
    """A parameter by itself, or weight and bias."""
    if theirs in shapes or ours.endswith(("token", "gamma")):
        yield Part(ours, (theirs,), shapes.get(theirs, ()))
    else:
        yield from _rows(ours, (theirs,), shapes)


def _rows(ours: str, theirs: tuple[str, ...], shapes: Shapes) -> Iterator[Part]:
    for kind in ("weight", "bias"):
        names = tuple(f"{name}.{kind}" for name in theirs)
        yield Part(f"{ours}.{kind}", names, shapes.get(names[0], ()))


Names = Callable[[str], str]
