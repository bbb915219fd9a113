"""Tensors of the VTP release to ours and back, exactly; no tensor is copied."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from vtp_core.official.layout import CHANNELS, PERIODS

CLIP = "clip"
"""The objective that holds the release's text tower and projections, by its name in the registry."""
_PARTS = {
    "trunk.feature_bottleneck.": ("bottleneck", "links.0."),
    "trunk.": ("encoder", ""),
    "pixel_decoder.": ("decoder", ""),
    "text_transformer.": (CLIP, "text.transformer."),
    "text_projection.": (CLIP, "text.text_projection."),
    "token_embedding.": (CLIP, "text.token_embedding."),
    "ln_final.": (CLIP, "text.ln_final."),
    "visual_proj.": (CLIP, "project."),
}
_WHOLE = {
    "positional_embedding": "text.positional_embedding",
    "text_projection": "text.text_projection",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_OURS = {ours: theirs for theirs, ours in _WHOLE.items()}


def to_ours(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of ``encoder``, ``bottleneck``, ``decoder`` and ``clip``; others are left out.

    Convolutions over patches become matrices, scalars lose their axis, and the periods of the rotary tables,
    which are constants, go.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "bottleneck": {}, "decoder": {}, CLIP: {}}
    for key, value in state.items():
        if key in _WHOLE:
            parts[CLIP][_WHOLE[key]] = value.reshape(()) if value.numel() == 1 else value
            continue
        prefix = next((prefix for prefix in _PARTS if key.startswith(prefix)), None)
        if prefix is None or key.endswith(PERIODS):
            continue
        part, ours = _PARTS[prefix]
        parts[part][ours + key.removeprefix(prefix)] = value.flatten(1) if value.ndim == 4 else value
    return {part: tensors for part, tensors in parts.items() if tensors}


def from_ours(parts: Mapping[str, Mapping[str, Tensor]], scalar: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """The inverse, but for the periods.

    Args:
        parts: as :func:`to_ours` gives them.
        scalar: shape of the scale and the bias of the logits.
    """
    state: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        for key, value in tensors.items():
            if part == CLIP and key in _OURS:
                state[_OURS[key]] = value.reshape(scalar) if key.startswith("logit") else value
            else:
                state[_theirs(part, key)] = _convolution(key, value)
    return state


def _theirs(part: str, key: str) -> str:
    for prefix, (owner, ours) in _PARTS.items():
        if owner == part and key.startswith(ours):
            return prefix + key.removeprefix(ours)
    raise LookupError(f"{part}.{key}")


def _convolution(key: str, value: Tensor) -> Tensor:
    if key == "patch_embed.proj.weight":
        side = math.isqrt(value.shape[1] // CHANNELS)
        return value.reshape(-1, CHANNELS, side, side)  # (D, ch * p * p) -> (D, ch, p, p)
    if key in {"proj_in.weight", "proj_out.weight"}:
        return value[:, :, None, None]  # (out, in) -> (out, in, 1, 1)
    return value
