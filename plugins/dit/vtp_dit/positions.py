"""Positions of tokens: sine-cosine tables (DiT, arXiv 2212.09748) and axial rotary angles (RoFormer, arXiv 2104.09864).

Both are made for the grid at hand, whatever its sides, and kept by grid, dtype and device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtp_core.models.rope import Tables
from vtp_dit.switches import Positions, Rotary

_BASE, _SPAN = 1e4, 16.0


def sincos(grid: tuple[int, ...], width: int) -> Tensor:
    """Sines, then cosines of each axis, the last axis first, at frequencies 10^4 ** (-i / n), n = width / 2 axes.

    Args:
        grid: tokens along each axis.
        width: D, a multiple of twice the number of axes.

    Returns:
        (N, D) float64, row-major.
    """
    count = width // (2 * len(grid))
    frequencies = _BASE ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)
    sides = [torch.arange(side, dtype=torch.float64, device="cpu") for side in grid]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)  # (N, axes)
    angles = places.flip(1)[:, :, None] * frequencies  # (N, axes, D / 2 axes)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)  # -> (N, D)


def angles(grid: tuple[int, ...], head_dim: int, kind: Rotary) -> Tensor:
    """Angles by which pairs of channels turn, the first axis' pairs first.

    Returns:
        (N, head_dim / 2) float64.
    """
    count = head_dim // (2 * len(grid))
    frequencies = _BASE ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)
    ends = [_SPAN if kind == "span" else side - 1 for side in grid]
    sides = [
        torch.linspace(0, end, side, dtype=torch.float64, device="cpu")
        for end, side in zip(ends, grid, strict=True)
    ]
    places = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)  # (N, axes)
    return (places[:, :, None] * frequencies).flatten(1)  # (N, axes, head_dim / 2 axes) -> (N, head_dim / 2)


class Rotation:
    """Tables of :func:`angles`, channel i turning with channel i + head_dim / 2.

    Args:
        head_dim: channels of one head, a multiple of twice the number of axes.
        axes: axes of the grid.
        kind: ``grid`` or ``span``.
    """

    def __init__(self, head_dim: int, axes: int, kind: Rotary) -> None:
        if head_dim % (2 * axes):
            raise ValueError(
                f"heads: {head_dim} channels per head; rope over {axes} axes needs a multiple of {2 * axes}"
            )
        self.head_dim, self.kind = head_dim, kind
        self._tables: dict[tuple[object, ...], Tables] = {}

    def tables(self, grid: tuple[int, ...], like: Tensor) -> Tables:
        """Cosines and sines (N, head_dim) for activations ``like``, in float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (grid, dtype, like.device)
        if key not in self._tables:
            # a table made in inference mode could never be saved for a later backward
            with torch.inference_mode(False), torch.no_grad():
                turns = angles(grid, self.head_dim, self.kind).tile(2)  # -> (N, head_dim)
                self._tables[key] = Tables(
                    turns.cos().to(like.device, dtype), turns.sin().to(like.device, dtype)
                )
        return self._tables[key]


class Places(nn.Module):
    """Adds positions to tokens.

    Args:
        kind: ``sincos`` for the actual grid, or ``learned`` for one grid.
        width: D.
        grid: tokens along each axis that a learned table is made for.
    """

    def __init__(self, kind: Positions, width: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        if width % (2 * len(grid)):
            raise ValueError(
                f"width: {width}; positions over {len(grid)} axes need a multiple of {2 * len(grid)}"
            )
        self.grid, self.width = grid, width
        self.table = nn.Parameter(sincos(grid, width).float()) if kind == "learned" else None
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Tokens (R, N, D) of a grid to the same shape."""
        if self.table is not None:
            if grid != self.grid:
                raise ValueError(f"positions: learned for {self.grid} tokens, not {grid}; take sincos")
            return tokens + self.table.to(tokens.dtype)
        key = (grid, tokens.dtype, tokens.device)
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = sincos(grid, self.width).to(tokens.device, tokens.dtype)
        return tokens + self._tables[key]
