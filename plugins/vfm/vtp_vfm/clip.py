"""Image towers of open_clip (CLIP, arXiv 2103.00020), to timm's network and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp_core.teachers.frozen import SIGNED
from vtp_plugins.errors import suggestion
from vtp_vfm.layout import Layout
from vtp_vfm.layouts import TABLE
from vtp_vfm.sizes import Tensors, arguments_of, depth_of, shape_of, side_of

PREFIX, TRUNK = "visual.", "visual.trunk."
_OUTER = {
    "conv1.weight": "patch_embed.proj.weight", "ln_pre.": "norm_pre.", "ln_post.": "norm.",
    "class_embedding": "cls_token", "positional_embedding": TABLE,
}  # fmt: skip
_INNER = {
    "transformer.resblocks.": "blocks.", ".ln_1.": ".norm1.", ".ln_2.": ".norm2.", ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
}  # fmt: skip
_FLAT = {"cls_token": 2, TABLE: 1}
"""Ours -> leading axes of one that theirs has not."""
_STRANGE = (
    "attentional_pool",
    "no_ln_pre",
    "pos_embed_type",
    "ls_init_value",
    "final_ln_after_pool",
    "act_kwargs",
)


class CLIP(Layout):
    """A tower of open_clip's own ViT; the projection into CLIP's space is another's.

    Args:
        model: open_clip's configuration of it.
        told: what is known of the weights, their mean, deviation and activation among it.
    """

    def __init__(self, model: Mapping[str, Any], told: Mapping[str, Any]) -> None:
        self.shape, self.told = model["vision_cfg"], told
        self.quick = bool(model.get("quick_gelu"))

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return f"{PREFIX}class_embedding" in tensors

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The image tower's tensors without their prefix, but not its projection."""
        found = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
        return {name: tensor for name, tensor in found.items() if name != "proj"}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section that the shapes and the configuration tell."""
        kernel = shape_of(own, "conv1.weight")
        hidden = shape_of(own, "transformer.resblocks.0.mlp.c_fc.weight")[0]
        side = side_of(shape_of(own, "positional_embedding")[0] - 1, "positional_embedding") * kernel[-1]
        if heads is None:
            heads = kernel[0] // int(self.shape.get("head_width", 64))
        depth = depth_of(own, "transformer.resblocks.")
        return {
            "name": f"vit_base_patch16_clip_{'quickgelu_' if self.quick else ''}224.openai",
            "normalise": "signed" if tuple(self.told.get("mean", ())) == SIGNED[0] else "own",
            "image_size": image_size or side,
            "arguments": {"img_size": side, **arguments_of(kernel, depth, hidden, heads)},
        }

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        found = {_renamed(name, _OUTER, _INNER): tensor for name, tensor in own.items()}
        return {k: t.reshape(*[1] * _FLAT.get(k, 0), *t.shape) for k, t in found.items()}

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse."""
        outer, inner = ({new: old for old, new in table.items()} for table in (_OUTER, _INNER))
        flat = {k: t.reshape(t.shape[_FLAT.get(k, 0) :]) for k, t in ours.items()}
        return {_renamed(name, outer, inner): tensor for name, tensor in flat.items()}


def configured(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's configuration of a model, and what it knows of its weights.

    Args:
        name: of the model, and behind a dot that of its weights, as the teacher ``open_clip`` takes them.

    Raises:
        ValueError: it knows no such model, or one that timm's network can't be.
    """
    import open_clip

    model, _, tag = name.partition(".")
    if model not in open_clip.list_models():  # a name like hf-hub:... would be downloaded
        raise ValueError(
            f"name: open_clip has no model {model!r}{suggestion(model, open_clip.list_models())}"
        )
    found: dict[str, Any] = open_clip.get_model_config(model)
    told: dict[str, Any] = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if tag and not told:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(f"name: open_clip has no weights {tag!r} of {model}{suggestion(tag, tags)}")
    if strange := [key for key in _STRANGE if found["vision_cfg"].get(key)]:
        raise ValueError(f"name: {model} has {strange[0]}, which timm's CLIP tower has not")
    if told.get("quick_gelu") and not found.get("quick_gelu"):
        raise ValueError(f"name: these weights want the activation of {model}-quickgelu")
    return found, told


def _renamed(name: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    for old, new in outer.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    for old, new in inner.items():
        name = name.replace(old, new)
    return name
