"""DINOv3 as ``transformers`` stores it, by way of its authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_vfm.dinov3 import DINOv3
from vtp_vfm.sizes import Tensors

_OUTER = {
    "embeddings.patch_embeddings.": "patch_embed.proj.", "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens", "layer.": "blocks.",
}  # fmt: skip
_INNER = {
    ".layer_scale1.lambda1": ".ls1.gamma", ".layer_scale2.lambda1": ".ls2.gamma", ".attention.o_proj.": ".attn.proj.",
}  # fmt: skip
_GATED = {".mlp.gate_proj.": ".mlp.w1.", ".mlp.up_proj.": ".mlp.w2.", ".mlp.down_proj.": ".mlp.w3."}
_PLAIN = {".mlp.up_proj.": ".mlp.fc1.", ".mlp.down_proj.": ".mlp.fc2."}
_QUERY, _KEY, _VALUE = (f".attention.{name}_proj." for name in "qkv")


class DINOv3Transformers(DINOv3):
    """Query, key and value apart, the key without a bias; periods are computed and not stored."""

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return "layer.0.layer_scale1.lambda1" in tensors

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tower's tensors, without the mask token."""
        return {name: tensor for name, tensor in tensors.items() if not name.endswith("mask_token")}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section that the shapes tell."""
        return super().node(_authors(own), heads, image_size)

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        return super().forward(_authors(own))

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse."""
        theirs = super().backward(ours, node)
        gated = any(".mlp.w1." in name for name in theirs)
        outer, inner = ({new: old for old, new in table.items()} for table in (_OUTER, _INNER | _mlp(gated)))
        found: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            stem, joint, kind = _renamed(name, outer, inner).partition(".attn.qkv.")
            if not joint:
                found[stem] = tensor
                continue
            query, key, value = tensor.chunk(3)
            found |= {f"{stem}{_QUERY}{kind}": query, f"{stem}{_VALUE}{kind}": value}
            if kind == "weight":
                found[f"{stem}{_KEY}{kind}"] = key
        return found


def _mlp(gated: bool) -> dict[str, str]:
    return _GATED if gated else _PLAIN


def _authors(own: Tensors) -> dict[str, Tensor]:
    """By the authors' names: one matrix of query, key and value."""
    inner = _INNER | _mlp(any(".mlp.gate_proj." in name for name in own))
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        stem, joint, kind = name.partition(_QUERY)
        if joint:
            key, value = own.get(f"{stem}{_KEY}{kind}"), own.get(f"{stem}{_VALUE}{kind}")
            rows = [torch.zeros_like(tensor) if row is None else row for row in (key, value)]
            found[f"{_renamed(stem, _OUTER, {})}.attn.qkv.{kind}"] = torch.cat([tensor, *rows])
        elif _KEY not in name and _VALUE not in name:
            found[_renamed(name, _OUTER, inner)] = tensor
    return found


def _renamed(name: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    for old, new in outer.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inner.items():
        name = name.replace(old, new)
    return name
