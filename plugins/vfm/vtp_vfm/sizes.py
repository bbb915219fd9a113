"""What the shapes of a tower's tensors tell of its size."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = Mapping[str, Tensor]
_HEAD = 64  # channels of a published head


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Shape of a tensor.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tuple(tensors[name].shape)


def depth_of(tensors: Tensors, prefix: str) -> int:
    """How many layers there are, by the numbers behind a prefix."""
    numbers = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in tensors)
    return 1 + max((int(number[1]) for number in numbers if number), default=-1)


def side_of(cells: int, name: str) -> int:
    """Side of a square of cells.

    Raises:
        ValueError: they are no square.
    """
    side = math.isqrt(cells)
    if side**2 != cells:
        raise ValueError(f"{name}: {cells} cells are no square")
    return side


def heads_of(width: int, heads: int | None) -> int:
    """How many heads there are: 64 channels each, where nothing is said.

    Raises:
        ValueError: the width is not one that is published, or they don't divide it.
    """
    if heads is None and width % _HEAD:
        raise ValueError(f"heads: width {width} is not published and the weights don't tell; say how many")
    found = heads or width // _HEAD
    if width % found:
        raise ValueError(f"heads: {found} do not divide width {width}")
    return found


def arguments_of(kernel: tuple[int, ...], depth: int, hidden: int, heads: int | None) -> dict[str, Any]:
    """Arguments of timm's constructor.

    Args:
        kernel: shape of the patch embedding's, (D, 3, P, P).
        depth: layers.
        hidden: width of a feed-forward, as timm counts it.
        heads: where they are said.
    """
    width, patch = kernel[0], kernel[-1]
    return {
        "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads_of(width, heads),
        # timm takes the whole part of the product
        "mlp_ratio": hidden / width if not hidden % width else (hidden + 0.25) / width,
    }  # fmt: skip


def nearest(models: Mapping[int, str], width: int) -> str:
    """Name of the model of a width, or of the nearest one below."""
    return models[max((w for w in models if w <= width), default=min(models))]
