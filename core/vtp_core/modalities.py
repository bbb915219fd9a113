"""Modalities that core knows: the image."""

from __future__ import annotations

import torch
from torch import Tensor

from vtp_plugins.spec import Spec

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Image:
    """RGB images; encoders read them with ImageNet's mean and deviation taken out.

    Args:
        spec: not read; images are images.
    """

    channels = 3
    axes = 2

    def __init__(self, spec: Spec | None = None) -> None:
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def normalise(self, x: Tensor) -> Tensor:
        """Images (..., 3, H, W), uint8 or float in [0, 1], to what encoders read; float64 stays float64."""
        whole = not x.is_floating_point()
        dtype = torch.float32 if whole else x.dtype
        mean, std = self._of(x.device, dtype)
        if whole:
            return x.to(dtype).sub_(255 * mean).div_(255 * std)
        return (x - mean) / std

    def to_display(self, x: Tensor) -> Tensor:
        """The inverse, to [0, 1], unclamped."""
        mean, std = self._of(x.device, x.dtype)
        return x * std + mean

    def _of(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (device, dtype)
        if key not in self._constants:
            with torch.inference_mode(False):
                mean, std = (torch.tensor(v, dtype=dtype, device=device).view(3, 1, 1) for v in (MEAN, STD))
            self._constants[key] = mean, std
        return self._constants[key]
