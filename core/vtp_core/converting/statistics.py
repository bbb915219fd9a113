"""Latent statistics as others store them: a scale, mean and deviation, mean and variance (specs/generators.md 0.5)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vtp_core.converting.files import read
from vtp_core.errors import DataFault, StackFault

EPS = 1e-5
"""RAE's, added to a variance."""


def of_scale(scale: float, channels: int) -> dict[str, Tensor]:
    """Statistics that multiply latents by ``scale``, such as 0.18215.

    Raises:
        StackFault: the scale is not positive.
    """
    if not 0 < scale < float("inf"):
        raise StackFault(f"--scale: a positive factor such as 0.18215 is wanted, not {scale}")
    return {"mean": torch.zeros(channels), "std": torch.full((channels,), 1 / scale)}


def of_file(file: Path, channels: int, grid: tuple[int, ...]) -> dict[str, Tensor]:
    """``mean`` and ``std`` of a file with ``mean`` and ``std`` or ``var``.

    Args:
        file: LightningDiT's ``latents_stats.pt``, (1, C, 1, 1); RAE's ``stat.pt``, (C, h, w), whose variance
            gets 1e-5; or (C,). Torch's, or safetensors.
        channels: C of the tokenizer.
        grid: its tokens along each axis.

    Returns:
        Both (C,) or (C, *grid), float32.

    Raises:
        DataFault: the file holds something else, or of another latent.
    """
    found = read(file)
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor | None) for v in found.values()):
        raise DataFault(f"{file} holds no latent statistics: mean and std, or mean and var, are wanted")
    mean, std, var = (found.get(key) for key in ("mean", "std", "var"))
    if std is None and var is not None:
        std = (var.double() + EPS).sqrt()
    if std is None:
        raise DataFault(f"{file} has {', '.join(map(str, found))}; std or var is wanted, and mean")
    mean = torch.zeros_like(std) if mean is None else mean
    shaped = {"mean": _shaped(mean, file, channels, grid), "std": _shaped(std, file, channels, grid)}
    if shaped["mean"].shape != shaped["std"].shape:
        raise DataFault(f"{file}: mean {tuple(mean.shape)} and deviation {tuple(std.shape)} differ in shape")
    if not all(value.isfinite().all() for value in shaped.values()) or not (shaped["std"] > 0).all():
        raise DataFault(f"{file}: mean and deviation are not finite, or a deviation is not above 0")
    return shaped


def _shaped(value: Tensor, file: Path, channels: int, grid: tuple[int, ...]) -> Tensor:
    """(C,) or (C, *grid)."""
    shape = tuple(value.shape)
    while len(shape) > 1 and shape[0] == 1 and len(shape) > len(grid) + 1:
        shape = shape[1:]
    if all(side == 1 for side in shape[1:]):
        shape = shape[:1]
    if shape not in {(channels,), (channels, *grid)}:
        raise DataFault(
            f"{file} is of latents {tuple(value.shape)}; this tokenizer's are {(channels, *grid)}, so ({channels},) is "
            "wanted, or one value for every position"
        )
    return value.reshape(shape).float()
