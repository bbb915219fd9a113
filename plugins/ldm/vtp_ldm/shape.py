"""What encoder and decoder share: their shape, and the range of pictures that they read and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtp_core.modalities import MEAN, STD
from vtp_plugins.spec import Spec

Range = Literal["signed", "normalised"]

SIZES: dict[str, dict[str, Any]] = {"tiny": {"channels": 32, "multipliers": (1, 2, 2, 4), "blocks": 1}}


@dataclass(frozen=True, slots=True)
class Shape:
    """Channels and attention of every level; level 0 has the picture's side.

    Attributes:
        widths: channels of each level.
        attends: whether each level has attention.
    """

    widths: tuple[int, ...]
    attends: tuple[bool, ...]

    @property
    def patch(self) -> int:
        """Pixels along the side of one place of the latent."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def levels(self) -> range:
        """Numbers of the levels."""
        return range(len(self.widths))


def shape_of(
    channels: int, multipliers: Sequence[int], groups: int, attention: Sequence[int], side: int
) -> Shape:
    """The levels that the options describe.

    Args:
        channels: width that ``multipliers`` multiply.
        multipliers: one a level.
        groups: of the norms.
        attention: sides of the map, in pixels of a picture of ``side``, at which there is attention.
        side: nominal side of the picture.

    Raises:
        ValueError: the norms' groups don't divide a width, or no level has a side of ``attention``.
    """
    widths = tuple(channels * multiplier for multiplier in multipliers)
    for width in (channels, *widths):
        if width % groups:
            raise ValueError(f"groups: {groups} does not divide {width} channels; choose another channels")
    sides = [side // 2**level for level in range(len(widths))]
    for wanted in attention:
        if wanted not in sides:
            raise ValueError(
                f"attention: no level has side {wanted}; of a picture of {side} the sides are "
                f"{', '.join(map(str, sides))}. Name some of these, or []"
            )
    return Shape(widths, tuple(own in attention for own in sides))


def check_picture(spec: Spec, range: Range) -> None:
    """Refuse signals that are no pictures.

    Raises:
        ValueError: the signal is not on two axes, or ``signed`` is asked of something else than images.
    """
    if len(spec.size) != 2:
        raise ValueError(f"modality {spec.modality!r} has {len(spec.size)} axes; these convolutions have 2")
    if range == "signed" and spec.modality != "image":
        raise ValueError(
            f"range: signed is [-1, 1] of images; modality {spec.modality!r} takes range: normalised"
        )


class Signed(nn.Module):
    """Pictures as the image modality normalises them, to [-1, 1] and back."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float64, and cast where they are read: no precision takes the rounding of another
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale", 2 * std, persistent=False)
        self.register_buffer("shift", 2 * mean - 1, persistent=False)

    def entered(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) to [-1, 1]."""
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)

    def left(self, x: Tensor) -> Tensor:
        """The inverse."""
        return (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype)
