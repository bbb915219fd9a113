"""State dicts and config fields of the VTP release (github.com/MiniMax-AI/VTP) to ours and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PARTS = {
    "trunk.feature_bottleneck.": ("bottleneck", "links.0."),
    "trunk.": ("encoder", ""),
    "pixel_decoder.": ("decoder", ""),
}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of the encoder, the bottleneck and the decoder by part; other tensors are left out.

    Convolutions over patches become matrices, and the periods of the rotary tables, which are constants, go.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "bottleneck": {}, "decoder": {}}
    for key, value in state.items():
        prefix = next((prefix for prefix in _PARTS if key.startswith(prefix)), None)
        if prefix is None or key.endswith("rope_embed.periods"):
            continue
        part, ours = _PARTS[prefix]
        parts[part][ours + key.removeprefix(prefix)] = value.flatten(1) if value.ndim == 4 else value
    return parts


def from_ours(parts: Mapping[str, Mapping[str, Tensor]], channels: int = 3) -> dict[str, Tensor]:
    """The inverse, with the release's convolutions; ``channels`` are the image's."""
    state: dict[str, Tensor] = {}
    for prefix, (part, ours) in _PARTS.items():
        for key, value in parts.get(part, {}).items():
            name = prefix + key.removeprefix(ours)
            if key == "patch_embed.proj.weight":
                side = math.isqrt(value.shape[1] // channels)
                value = value.unflatten(1, (channels, side, side))  # (D, ch * p * p) -> (D, ch, p, p)
            elif key in {"proj_in.weight", "proj_out.weight"}:
                value = value[:, :, None, None]  # (out, in) -> (out, in, 1, 1)
            state[name] = value
    return state


def options(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of our encoder, bottleneck and decoder, from the release's ``config.json``."""
    encoder = {
        "patch": config["vision_patch_size"],
        "image_size": config["image_size"],
        "width": config["vision_embed_dim"],
        "depth": config["vision_depth"],
        "heads": config["vision_num_heads"],
        "mlp_ratio": config["vision_mlp_ratio"],
        "ffn": config["vision_ffn_layer"],
        "norm": config["vision_norm_layer"],
        "qk_norm": config["vision_use_qk_norm"],
        "layer_scale": config["vision_init_values"],
        "rope_dtype": "bfloat16",
    }
    decoder = {
        "width": config["decoder_embed_dim"],
        "depth": config["decoder_depth"],
        "heads": config["decoder_num_heads"],
        "ffn": config["decoder_ffn_layer"],
        "norm": config["decoder_norm_layer"],
        "qk_norm": config["decoder_use_qk_norm"],
        "layer_scale": config["decoder_init_values"],
        "rope_dtype": "bfloat16",
    }
    bottleneck = {"channels": config["vision_feature_bottleneck"]}
    return {"encoder": encoder, "bottleneck": bottleneck, "decoder": decoder}
