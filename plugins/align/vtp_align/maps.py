"""Tokens as maps on a grid: whose grid is it, another size, another scale."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from vtp_plugins.errors import StackFault

Resize = Literal["none", "bilinear", "bicubic", "area"]
Normalise = Literal["none", "spatial", "layer", "rms", "l2"]
Grid = tuple[int, ...]

EPS = 1e-6  # iREPA's, and that of RMS norms


def grid_of(tokens: Tensor, like: Grid, whose: str) -> Grid:
    """Sides of the grid of tokens (B, N, C), whose aspect is that of ``like``.

    Raises:
        StackFault: N tokens make no grid of that aspect.
    """
    count = tokens.shape[1]
    scale = (count / math.prod(like)) ** (1 / len(like))
    grid = tuple(round(side * scale) for side in like)
    if math.prod(grid) != count:
        raise StackFault(f"{whose}: {count} tokens are no grid shaped as {_times(like)}; choose another size")
    return grid


def resized(tokens: Tensor, own: Grid, to: Grid, mode: Resize) -> Tensor:
    """Tokens (B, N, C) of grid ``own`` at the grid ``to``, (B, M, C); pixel centres, no antialiasing."""
    if own == to:
        return tokens
    how = {"bilinear": {1: "linear", 2: "bilinear", 3: "trilinear"}[len(own)]}.get(mode, mode)
    keys = {} if mode == "area" else {"align_corners": False}
    moved: Tensor = F.interpolate(as_map(tokens, own), size=to, mode=how, **keys)
    return as_tokens(moved)


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) to (B, C, *grid)."""
    z: Tensor = tokens.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, *grid)
    return z


def as_tokens(z: Tensor) -> Tensor:
    """(B, C, *grid) to (B, N, C)."""
    return z.flatten(2).transpose(1, 2)  # (B, C, *grid) -> (B, N, C)


def normalised(y: Tensor, how: Normalise, mean_share: float = 1.0) -> Tensor:
    """Tokens (B, N, C) by ``spatial`` (each channel over the N tokens), or by token: layer, rms, l2."""
    if how == "spatial":
        centred = y - mean_share * y.mean(1, keepdim=True)
        return centred / (y.std(1, keepdim=True) + EPS)
    if how == "layer":
        return F.layer_norm(y, y.shape[-1:], eps=EPS)
    if how == "rms":
        return F.rms_norm(y, y.shape[-1:], eps=EPS)
    return F.normalize(y, dim=-1) if how == "l2" else y


def _times(grid: Grid) -> str:
    return " x ".join(map(str, grid))


def unequal(on: str, own: Grid, target: str, other: Grid) -> StackFault:
    """The fault of two grids that nobody resizes."""
    return StackFault(
        f"resize: none takes equal grids, but {on} has {math.prod(own)} tokens ({_times(own)}) and {target} "
        f"{math.prod(other)} ({_times(other)}); set resize: bilinear, or the teacher's size"
    )
