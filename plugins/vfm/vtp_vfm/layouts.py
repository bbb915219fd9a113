"""Names of published towers and of RAE's decoder, against those of our modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Names = dict[str, tuple[str, ...]]
"""Our name -> theirs; the rows of several of theirs lie below each other in ours."""
TABLE = "pos_embed"


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer as ``transformers`` names it.

    Attributes:
        sign: a name that only this layout has, behind whatever prefix.
        layer: prefix of a layer, before its number.
        attention: query, key, value and output of a layer.
        inner: our name -> theirs, of what a layer has besides.
        outer: our name -> theirs, of what stands outside of the layers.
        positions: name of the position table, which has a place for the class token.
        flat: whether that table is (N, D), without one.
        registers: name of the register tokens, which have no places; empty where there are none.
        norm: the final norm, which RAE takes off.
        elsewhere: beginnings of names that belong to others: heads, mask tokens, the final norm.
        models: timm's name by width.
        signed: whether pictures are read in [-1, 1].
        eps: of the norms, where it is not timm's.
    """

    sign: str
    layer: str
    attention: tuple[str, str, str, str]
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    positions: str
    norm: str
    elsewhere: tuple[str, ...]
    models: Mapping[int, str]
    flat: bool = False
    registers: str = ""
    signed: bool = False
    eps: float | None = None

    def model(self, width: int, registers: bool) -> str:
        """Timm's name of the tower of this width, or of the nearest one below."""
        known = max((w for w in self.models if w <= width), default=min(self.models))
        name = self.models[known]
        return name.replace("_dinov2", "_reg4_dinov2") if registers else name

    def names(self, depth: int, registers: int, affine: bool = False) -> Names:
        """Every tensor, the final norm's only if ``affine``."""
        found: Names = {TABLE: (self.positions,)}
        if affine:
            found |= _rows("norm", self.norm)
        if registers:
            found["reg_token"] = (self.registers,)
        for ours, theirs in self.outer.items():
            found |= _pair(ours, theirs)
        for index in range(depth):
            ours, theirs = f"blocks.{index}.", f"{self.layer}{index}."
            query, key, value, out = (theirs + name for name in self.attention)
            found |= _rows(f"{ours}attn.qkv", query, key, value) | _rows(f"{ours}attn.proj", out)
            for name, other in self.inner.items():
                found |= _pair(ours + name, theirs + other)
        return found


_EMBEDDINGS = "embeddings.patch_embeddings.projection"
_ATTENTION = (
    "attention.attention.query", "attention.attention.key", "attention.attention.value",
    "attention.output.dense",
)  # fmt: skip
DINOV2 = Tower(
    sign="encoder.layer.0.layer_scale1.lambda1",
    layer="encoder.layer.",
    attention=_ATTENTION,
    inner={
        "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
    },
    outer={"cls_token": "embeddings.cls_token", "patch_embed.proj": _EMBEDDINGS},
    positions="embeddings.position_embeddings",
    registers="embeddings.register_tokens",
    norm="layernorm",
    elsewhere=("embeddings.mask_token", "layernorm.", "pooler."),
    models={384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"},
)  # fmt: skip
MAE = Tower(
    sign="encoder.layer.0.layernorm_before.weight",
    layer="encoder.layer.",
    attention=_ATTENTION,
    inner={
        "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    },
    outer={"cls_token": "embeddings.cls_token", "patch_embed.proj": _EMBEDDINGS},
    positions="embeddings.position_embeddings",
    norm="layernorm",
    elsewhere=("layernorm.", "pooler."),
    models={
        768: "vit_base_patch16_224.mae", 1024: "vit_large_patch16_224.mae", 1280: "vit_huge_patch14_224.mae",
    },
    eps=1e-12,
)  # fmt: skip
SIGLIP = Tower(
    sign="encoder.layers.0.self_attn.q_proj.weight",
    layer="encoder.layers.",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    inner={"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    outer={"patch_embed.proj": "embeddings.patch_embedding"},
    positions="embeddings.position_embedding.weight",
    flat=True,
    norm="post_layernorm",
    elsewhere=("post_layernorm.", "head."),
    models={
        768: "vit_base_patch16_siglip_256.v2_webli", 1024: "vit_large_patch16_siglip_256.v2_webli",
        1152: "vit_so400m_patch16_siglip_256.v2_webli",
    },
    signed=True,
)  # fmt: skip
DINOV2_GATED = replace(
    DINOV2,
    inner={**DINOV2.inner, "mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"},
    models={1536: "vit_giant_patch14_dinov2"},
)
TOWERS = (DINOV2, MAE, SIGLIP)
DECODER_TABLE = "decoder_pos_embed"
DECODER = ("decoder_", "trainable_cls_token")
"""How the names of RAE's decoder begin."""


def decoder_names(depth: int) -> Names:
    """Every tensor of RAE's decoder but its table of positions."""
    found: Names = {"token": ("trainable_cls_token",)}
    for ours, theirs in (("proj_in", "embed"), ("norm", "norm"), ("proj_out", "pred")):
        found |= _rows(ours, f"decoder_{theirs}")
    inner = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "proj": _ATTENTION[3],
        "fc1": "intermediate.dense", "fc2": "output.dense",
    }  # fmt: skip
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"decoder_layers.{index}."
        found |= _rows(f"{ours}qkv", *(theirs + name for name in _ATTENTION[:3]))
        for name, other in inner.items():
            found |= _rows(ours + name, theirs + other)
    return found


def joined(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors out of theirs."""
    return {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}


def parted(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        rows = tensors[ours].chunk(len(theirs))
        found |= {name: part.clone() for name, part in zip(theirs, rows, strict=True)}
    return found


def _pair(ours: str, theirs: str) -> Names:
    """A parameter by itself, or weight and bias."""
    return {ours: (theirs,)} if ours.endswith(("_token", ".gamma")) else _rows(ours, theirs)


def _rows(ours: str, *theirs: str) -> Names:
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in ("weight", "bias")}
