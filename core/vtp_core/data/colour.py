"""Colour augmentation of a few small crops at once: torchvision's maths, batched over crops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


def luma(x: Tensor) -> Tensor:
    """Brightness as the eye weighs it, (K, 1, h, w)."""
    red, green, blue = x.split(1, dim=1)
    return torch.add(red * LUMA[0], green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def column(values: Sequence[float]) -> Tensor:
    """One number per crop, shaped (K, 1, 1, 1)."""
    return torch.tensor(values).view(-1, 1, 1, 1)


def brightness(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Scale; x is (K, 3, h, w) float in 0..255, here and below."""
    return (x * column(factors)).clamp_(0, 255)


def contrast(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Move away from the mean luma of each crop."""
    factor = column(factors)
    mean = luma(x).mean((1, 2, 3), keepdim=True)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 255)


def saturation(x: Tensor, factors: Sequence[float]) -> Tensor:
    """Move away from grey; a factor of 0 is greyscale."""
    return torch.lerp(luma(x), x, column(factors)).clamp_(0, 255)


def hue(x: Tensor, shifts: Sequence[float]) -> Tensor:
    """Turn the hue by a share of the full circle, value and saturation kept.

    HSV without the detour: with value V, chroma C and hue H in sixths, a channel is
    V - C * clamp(min(k, 4 - k), 0, 1), k = (5, 3, 1 + H) mod 6 for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    scale = chroma.clamp_min(1e-6).reciprocal_()
    sixths = torch.where(
        high == red,
        (green - blue) * scale,
        torch.where(high == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    turned = sixths.unsqueeze(1) + torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)  # (K, 3, h, w)
    k = turned.add_(column(shifts), alpha=6)
    k.sub_(torch.floor(k * (1 / 6)), alpha=6)  # modulo 6; torch's remainder is three times slower
    return torch.addcmul(
        high.unsqueeze(1), chroma.unsqueeze(1), torch.minimum(k, 4 - k).clamp_(0, 1), value=-1
    )


def solarize(x: Tensor, threshold: float) -> Tensor:
    """Invert what is at least as bright as ``threshold``."""
    return torch.where(x >= threshold, 255 - x, x)


def blur(x: Tensor, sigma: float, taps: int) -> Tensor:
    """Gaussian blur with ``taps`` taps along each axis and reflected borders."""
    reach = taps // 2
    bell = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)]
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    for axis in (2, 3):  # shifted sums beat convolutions at these sizes
        side = x.shape[axis] - 2 * reach
        y = x.narrow(axis, 0, side) * (bell[0] / sum(bell))
        for i in range(1, taps):
            y.add_(x.narrow(axis, i, side), alpha=bell[i] / sum(bell))
        x = y
    return x
