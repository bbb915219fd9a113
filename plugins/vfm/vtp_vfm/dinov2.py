"""DINOv2 (arXiv 2304.07193) as its authors store it, to timm's network and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_vfm.layout import Layout
from vtp_vfm.layouts import TABLE
from vtp_vfm.sizes import Tensors, arguments_of, depth_of, nearest, shape_of, side_of

_MODELS = {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2", 1024: "vit_large_patch14_dinov2"}
_GATED = "vit_giant_patch14_dinov2"
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")
_REGISTERS, _OURS = "register_tokens", "reg_token"
_W12, _W3 = ".mlp.w12.", ".mlp.w3."


class DINOv2(Layout):
    """The release's names: timm's, but for registers, the fused matrices of SwiGLU and the table of positions.

    That table has a place for the class token and none for registers; in ours those are zero, since timm's own
    file has the class token's place added to it, which can't be undone.
    """

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return TABLE in tensors and "blocks.0.ls1.gamma" in _whole(tensors)

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tower's tensors, blocks by their number alone; not the mask token and heads of training."""
        others = ("mask_token", "head.", "dino_head.", "ibot_head.")
        return {name: tensor for name, tensor in _whole(tensors).items() if not name.startswith(others)}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section that the shapes tell."""
        kernel, gated = shape_of(own, "patch_embed.proj.weight"), f"blocks.0{_W12}weight" in own
        hidden = shape_of(own, f"blocks.0{_W12 if gated else '.mlp.fc1.'}weight")[0]
        registers = shape_of(own, _REGISTERS)[1] if _REGISTERS in own else 0
        name = _GATED if gated else nearest(_MODELS, kernel[0])
        side = side_of(shape_of(own, TABLE)[1] - 1, TABLE) * kernel[-1]
        arguments = {"img_size": side, **arguments_of(kernel, depth_of(own, "blocks."), hidden, heads)}
        if registers:
            name = name.replace("_dinov2", "_reg4_dinov2")
            arguments |= {"reg_tokens": registers, "no_embed_class": False}
        return {"name": name, "image_size": image_size or side, "arguments": arguments}

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        found = {name.replace(_W12, ".mlp.fc1.").replace(_W3, ".mlp.fc2."): t for name, t in own.items()}
        registers = found.pop(_REGISTERS, None)
        if registers is not None:
            table = found[TABLE]
            empty = table.new_zeros(1, registers.shape[1], table.shape[2])
            found |= {_OURS: registers, TABLE: torch.cat([table[:, :1], empty, table[:, 1:]], dim=1)}
        return found

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse; places of registers that were trained since go into the registers."""
        found = dict(ours)
        if node["name"].startswith("vit_giant"):
            found = {k.replace(".mlp.fc1.", _W12).replace(".mlp.fc2.", _W3): t for k, t in found.items()}
        registers = found.pop(_OURS, None)
        if registers is not None:
            table, end = found[TABLE], 1 + registers.shape[1]
            places = table[:, 1:end]
            if not places.is_meta and places.any():
                registers = registers + places
            found |= {_REGISTERS: registers, TABLE: torch.cat([table[:, :1], table[:, end:]], dim=1)}
        return found


def _whole(tensors: Tensors) -> dict[str, Tensor]:
    """Without the chunks that training groups blocks in, where they keep their numbers."""
    return {_CHUNK.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
