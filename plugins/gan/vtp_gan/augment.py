"""What critics see of a picture: DiffAug (arXiv 2006.10738), a blur that fades, 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 7  # a sample: translation (h, w), brightness, saturation, contrast, place of the cutout (h, w)


def augmented(x: Tensor, draws: Tensor, switches: Sequence[bool], cutout: float) -> Tensor:
    """Translated by up to an eighth, recoloured, and with a square cut out; differentiable.

    Args:
        x: pictures (B, ch, H, W) in [-1, 1].
        draws: (7, B) in [0, 1), in the order of ``DRAWS``.
        switches: whether translation, colour and cutout are on.
        cutout: side of the square as a share of the picture's; at most 0 cuts nothing.
    """
    moved, coloured, cut = switches
    if moved:
        x = _translated(x, draws[0], draws[1])
    if coloured:
        x = _recoloured(x, *draws[2:5].to(x.dtype))
    if cut and cutout > 0:
        x = _cut(x, draws[5], draws[6], cutout)
    return x


def _translated(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """out(i, j) = in(i + t, j + s), 0 outside."""
    rows, inside = _places(x.shape[-2], down)  # (B, H)
    columns, within = _places(x.shape[-1], right)  # (B, W)
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x.movedim(1, -1)[samples, rows[:, :, None], columns[:, None, :]]  # (B, H, W, ch)
    return moved.movedim(-1, 1) * (inside[:, :, None] & within[:, None, :])[:, None]


def _places(side: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Where each place along an axis reads, and whether that is inside; (B, side)."""
    most = round(side / 8)
    shift = (draw * (2 * most + 1)).floor().long() - most
    places = torch.arange(side, device=draw.device) + shift[:, None]
    return places.clamp(0, side - 1), (places >= 0) & (places < side)


def _recoloured(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (r.view(-1, 1, 1, 1) for r in (brightness, saturation, contrast))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _cut(x: Tensor, down: Tensor, right: Tensor, share: float) -> Tensor:
    rows = _gap(x.shape[-2], down, share)[:, :, None]
    columns = _gap(x.shape[-1], right, share)[:, None, :]
    return x * ~(rows & columns)[:, None]


def _gap(side: int, draw: Tensor, share: float) -> Tensor:
    """The places along an axis that a square covers, (B, side)."""
    size = round(side * share)
    first = (draw * (side + 1 - size % 2)).floor().long() - size // 2
    off = torch.arange(side, device=draw.device) - first[:, None]
    return (off >= 0) & (off < size)


def blurred(x: Tensor, amount: float) -> Tensor:
    """A blur of deviation amount * sqrt(H / 2), in powers of two; amount 0 changes nothing."""
    sigma = amount * math.sqrt(x.shape[-2] / 2)
    reach = math.floor(3 * sigma)
    if reach < 1:
        return x
    taps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype).div(sigma).square().neg().exp2()
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)
    reach_h, reach_w = min(reach, x.shape[-2] - 1), min(reach, x.shape[-1] - 1)
    cut_h, cut_w = (taps[..., reach - r : taps.shape[-1] - reach + r] for r in (reach_h, reach_w))
    x = F.pad(x, (reach_w, reach_w, reach_h, reach_h), mode="reflect")
    x = F.conv2d(x, cut_h[..., None], groups=x.shape[1])
    return F.conv2d(x, cut_w[..., None, :], groups=x.shape[1])


def quantised(x: Tensor) -> Tensor:
    """Pictures in [-1, 1], clamped and rounded to 8 bits."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
