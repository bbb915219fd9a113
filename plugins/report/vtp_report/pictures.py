"""Tensors to pictures inside the page: small, lossless where they are small, shown at whole-number zoom."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 128  # pixels; larger pictures are scaled down, so that a page stays under 4 MB
LOSSLESS = 64  # pixels; up to here every pixel is kept


@dataclass(frozen=True, slots=True)
class Picture:
    """An <img>.

    Attributes:
        uri: the picture itself, as a data: URI.
        alt: what it shows, in words.
        width: pixels of the original across; maps of features take the width of their picture.
    """

    uri: str
    alt: str
    width: int

    @property
    def large(self) -> int:
        """CSS pixels across where there is room: a whole multiple of ``width``."""
        return self.width * max(1, LARGEST // self.width)

    @property
    def small(self) -> int:
        """CSS pixels across on a phone and in lists."""
        return self.width * max(1, LOSSLESS // self.width)


def picture(x: Tensor, alt: str, width: int | None = None) -> Picture:
    """The picture of x (ch, h, w) in [0, 1], clamped; ``width`` overrides the width it is laid out at."""
    x = _shrunk(x.detach().float().cpu())
    return Picture(uri=_uri(x), alt=alt, width=width or x.shape[-1])


def layout_width(x: Tensor) -> int:
    """The width that :func:`picture` gives x (ch, h, w); maps of features beside it take the same."""
    return round(x.shape[-1] * min(1.0, LARGEST / max(x.shape[-2:])))


def _shrunk(x: Tensor) -> Tensor:
    from torch.nn.functional import interpolate

    side = max(x.shape[-2:])
    if side <= LARGEST:
        return x
    size = [max(1, round(s * LARGEST / side)) for s in x.shape[-2:]]
    return interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]


def _uri(x: Tensor) -> str:
    from PIL import Image

    levels = x.clamp(0, 1).mul(255).round().byte()
    array = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()  # (ch, h, w) -> (h, w, 3)
    small = max(array.shape[:2]) <= LOSSLESS
    out = io.BytesIO()
    if small:
        Image.fromarray(array).save(out, "WEBP", lossless=True, quality=60, method=4)
    else:
        Image.fromarray(array).save(out, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
