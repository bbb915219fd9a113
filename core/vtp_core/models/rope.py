"""Axial rotary positions, coordinates in [-1, 1]: DINOv3 (arXiv 2508.10104), VTP (arXiv 2512.13687)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Tables:
    """Cosines and sines of every token, (T, head_dim); prefix tokens have angle 0 and so stay as they are."""

    cos: Tensor
    sin: Tensor

    def at(self, places: Tensor) -> Tables:
        """Tables of single tokens, (Q, 1, head_dim), for queries (Q, heads, head_dim)."""
        return Tables(self.cos[places].unsqueeze(1), self.sin[places].unsqueeze(1))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x (..., T, head_dim) in the tables' dtype; channel i turns with channel i + head_dim / 2.

        bfloat16 products and sums are rounded one by one, which released VTP weights expect.
        """
        y = x.to(self.cos.dtype)
        first, second = y.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (y * self.cos + turned * self.sin).to(x.dtype)


class Rope:
    """Tables by grid, computed once per grid, dtype and device.

    Args:
        head_dim: channels of one head; a multiple of twice the number of axes.
        axes: axes of the grid.
        dtype: ``bfloat16`` computes and keeps periods and tables in bfloat16, as the VTP release does.
        base: longest period over shortest.
    """

    def __init__(self, head_dim: int, axes: int, dtype: RopeDtype = "float32", base: float = 100.0) -> None:
        if head_dim % (2 * axes):
            raise ValueError(
                f"heads: {head_dim} channels per head; {axes} axes need a multiple of {2 * axes}"
            )
        self.bfloat16 = dtype == "bfloat16"
        exact = torch.bfloat16 if self.bfloat16 else torch.float64
        exponents = 2 * torch.arange(head_dim // (2 * axes), dtype=exact, device="cpu") / (head_dim // axes)
        self.periods: Tensor = base**exponents
        self._tables: dict[tuple[object, ...], Tables] = {}

    def tables(self, grid: tuple[int, ...], like: Tensor, prefix: int = 0) -> Tables:
        """Tables of a grid, row-major, for activations ``like``.

        Args:
            grid: tokens along each axis.
            like: gives the device; its dtype matters to float32 rotation only, which float64 makes float64.
            prefix: tokens before the grid's, which are not rotated.
        """
        dtype = torch.bfloat16 if self.bfloat16 else torch.promote_types(like.dtype, torch.float32)
        key = (grid, prefix, dtype, like.device)
        if key not in self._tables:
            # a table made in inference mode could never be saved for a later backward
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = self._compute(grid, prefix, dtype, like.device)
        return self._tables[key]

    def _compute(
        self, grid: tuple[int, ...], prefix: int, dtype: torch.dtype, device: torch.device
    ) -> Tables:
        exact = self.periods.dtype
        sides = [2.0 * (torch.arange(0.5, side, dtype=exact, device="cpu") / side) - 1.0 for side in grid]
        coords = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)  # (N, axes)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # (N, axes, head_dim / 2 axes)
        angles = angles.flatten(1).tile(2)  # -> (N, head_dim)
        still = angles.new_zeros(prefix, angles.shape[1])
        angles = torch.cat([still, angles])  # (N, head_dim) -> (prefix + N, head_dim)
        return Tables(angles.cos().to(device, dtype), angles.sin().to(device, dtype))
