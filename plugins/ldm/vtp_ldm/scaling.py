"""How other code bases scale latents, as statistics of ours: (z - mean) / std."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_KEYS = {
    "scaling_factor": "scaling_factor", "shift_factor": "shift_factor", "norm_num_groups": "groups",
    "latents_mean": "latents_mean", "latents_std": "latents_std",
}  # fmt: skip
"""Keys of diffusers' configuration -> options of ours."""


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options out of the ``config.json`` of diffusers' ``AutoencoderKL``; none of another class's.

    The size of pictures is not among them: diffusers' is what the pipeline makes, not what attention counts from.
    """
    if config.get("_class_name") != "AutoencoderKL":
        return {}
    return {ours: config[key] for key, ours in _KEYS.items() if config.get(key) is not None}


def moments_of(
    channels: int,
    scale: float | None,
    shift: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Statistics of a latent that is seen as (z - shift) * scale, or as (z - mean) * scale / std.

    Args:
        channels: C of the latent.
        scale: SD-VAE's 0.18215, SD3's 1.5305, FLUX's 0.3611; None where nothing is said, then 1.
        shift: SD3's 0.0609, FLUX's 0.1159.
        mean: of each channel, in place of the shift.
        std: likewise.

    Returns:
        ``mean`` and ``std``, (C,); empty where nothing is said.

    Raises:
        ValueError: nothing can be divided by these, or they are of another latent.
    """
    if scale is None and not shift and mean is None and std is None:
        return {}
    scale = 1.0 if scale is None else scale
    if not math.isfinite(shift) or not 0 < scale < math.inf:
        raise ValueError(
            f"scaling_factor: a positive factor and a finite shift are wanted, not {scale}, {shift}"
        )
    if (mean is not None or std is not None) and shift:
        raise ValueError("latents_mean: it takes the place of shift_factor; give one of both")
    found = {
        "mean": _by_channel("latents_mean", mean, shift, channels),
        "std": _by_channel("latents_std", std, 1.0, channels) / scale,
    }
    if not (found["std"] > 0).all() or not all(value.isfinite().all() for value in found.values()):
        raise ValueError("latents_std: every deviation must be finite and above 0")
    return {name: value.float() for name, value in found.items()}


def _by_channel(key: str, given: Sequence[float] | None, default: float, channels: int) -> Tensor:
    values = [default] * channels if given is None else given
    if len(values) != channels:
        raise ValueError(f"{key}: {len(values)} values for {channels} channels")
    return torch.tensor(values, dtype=torch.float64)
