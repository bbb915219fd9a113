"""Pictures in the range of a network, out of what the image modality normalised, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtp_core.modalities import MEAN, STD
from vtp_plugins.spec import Spec


class Range(nn.Module):
    """A change of mean and deviation; the same ones change nothing, bit for bit.

    Args:
        mean: of the channels of a picture in [0, 1], that the network expects to be taken out.
        deviation: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        own = torch.tensor([tuple(mean), tuple(deviation)], dtype=torch.float64, device="cpu").view(
            2, 3, 1, 1
        )
        ours = torch.tensor([MEAN, STD], dtype=torch.float64, device="cpu").view(2, 3, 1, 1)
        self.same = torch.equal(own, ours)
        # float64, and cast where they are read: no precision takes the rounding of another
        self.register_buffer("scale", ours[1] / own[1], persistent=False)
        self.register_buffer("shift", (ours[0] - own[0]) / own[1], persistent=False)

    def entered(self, x: Tensor) -> Tensor:
        """What the modality normalised, (B, 3, H, W), as the network reads it."""
        return x if self.same else x * self.scale.to(x.dtype) + self.shift.to(x.dtype)

    def left(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.same else (x - self.shift.to(x.dtype)) / self.scale.to(x.dtype)


def check_pictures(spec: Spec) -> None:
    """Refuse signals that are no pictures.

    Raises:
        ValueError: the modality is another than images.
    """
    if spec.modality != "image":
        raise ValueError(f"modality {spec.modality!r}: this network is made for images")
