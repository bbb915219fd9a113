"""DINOv3 (arXiv 2508.10104) as its authors store it, to timm's network and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core.models.rope import Rope
from vtp_vfm.layout import Layout
from vtp_vfm.layouts import TABLE
from vtp_vfm.sizes import Tensors, arguments_of, depth_of, nearest, shape_of

_MODELS = {
    384: "vit_small_patch16_dinov3", 768: "vit_base_patch16_dinov3", 1024: "vit_large_patch16_dinov3",
}  # fmt: skip
_GATED = {
    384: "vit_small_plus_patch16_dinov3", 1280: "vit_huge_plus_patch16_dinov3", 4096: "vit_7b_patch16_dinov3",
}  # fmt: skip
_PLAIN = {"storage_tokens": "reg_token", ".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}
_SWIGLU = {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}
_BIAS, _PERIODS, _MASK = "attn.qkv.bias", "rope_embed.periods", ".bias_mask"
_ROUNDED = 2.0**-7  # published periods went through bfloat16
_CELLS = 16  # of the picture that timm's configuration names


class DINOv3(Layout):
    """The release's names; positions are rotary, and of the biases of query, key and value the key's is masked."""

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return TABLE not in tensors and "blocks.0.ls1.gamma" in tensors

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tower's tensors; constants, the mask token and what only training reads are left out."""
        ends, begins = (
            (_PERIODS, _MASK, "mask_token"),
            ("local_cls_norm.", "head.", "dino_head.", "ibot_head."),
        )
        return {k: t for k, t in tensors.items() if not k.endswith(ends) and not k.startswith(begins)}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section that the shapes tell."""
        kernel = shape_of(own, "patch_embed.proj.weight")
        gated, biased = "blocks.0.mlp.w1.weight" in own, f"blocks.0.{_BIAS}" in own
        hidden = shape_of(own, f"blocks.0.mlp.{'w1' if gated else 'fc1'}.weight")[0]
        name = nearest(_GATED if gated else _MODELS, kernel[0])
        side = image_size or _CELLS * kernel[-1]
        arguments = {
            "img_size": side, **arguments_of(kernel, depth_of(own, "blocks."), hidden, heads),
            "num_reg_tokens": shape_of(own, "storage_tokens")[1] if "storage_tokens" in own else 0,
        }  # fmt: skip
        return {"name": f"{name}_qkvb" if biased else name, "image_size": side, "arguments": arguments}

    def heads(self, tensors: Tensors) -> int | None:
        """A head has four channels for each period of its rotation: two axes, a cosine and a sine."""
        if _PERIODS not in tensors:
            return None
        width, periods = shape_of(tensors, "norm.weight")[0], len(tensors[_PERIODS])
        return None if width % (4 * periods) else width // (4 * periods)

    def check(self, tensors: Tensors, node: Mapping[str, Any]) -> None:
        """Refuse rotary periods of another base, and biases of keys.

        Raises:
            ValueError: the network would compute something else.
        """
        arguments = node["arguments"]
        for name, tensor in tensors.items():
            if name.endswith(_PERIODS):
                exact = Rope(arguments["embed_dim"] // arguments["num_heads"], 2).periods
                if tensor.shape != exact.shape or not torch.allclose(tensor.double(), exact, rtol=_ROUNDED):
                    raise ValueError(f"heads: {name} is not of base 100 and {arguments['num_heads']} heads")
            elif name.endswith(_BIAS):
                mask = tensors.get(f"{name}_mask")
                query, key, value = (tensor if mask is None else mask).chunk(3)
                if key.any() or (mask is not None and not torch.cat([query, value]).eq(1).all()):
                    raise ValueError(f"{name}: keys have a bias here, which DINOv3 masks")

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        found: dict[str, Tensor] = {}
        for name, tensor in own.items():
            if name.endswith(_BIAS):
                query, _, value = tensor.chunk(3)
                stem = name.removesuffix("qkv.bias")
                found |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
            else:
                found[_renamed(name, _PLAIN | _SWIGLU)] = tensor
        return found

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse; the biases of keys are zero."""
        table = _PLAIN | (_SWIGLU if any(".fc1_g." in name for name in ours) else {})
        back, found = {new: old for old, new in table.items()}, {}
        for name, tensor in ours.items():
            if name.endswith("q_bias"):
                stem = name.removesuffix("q_bias")
                found[f"{stem}qkv.bias"] = torch.cat(
                    [tensor, torch.zeros_like(tensor), ours[f"{stem}v_bias"]]
                )
            elif not name.endswith("v_bias"):
                found[_renamed(name, back)] = tensor
        return found


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name
