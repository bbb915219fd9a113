"""Files to pictures: bounded, in colour, on white, the right way up, no larger than what views need."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 64_000_000
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class BadSample(ValueError):
    """A sample that cannot be read.

    Args:
        reason: short and countable: ``truncated``, ``too large``.
        name: file, or shard and key.
        detail: what the decoder said.
    """

    def __init__(self, reason: str, name: str, detail: str = "") -> None:
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.name, self.detail = reason, name, detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        return BadSample, (self.reason, self.name, self.detail)


def of_disk(error: BaseException) -> bool:
    """Whether a read failed that may succeed the next time; who remembers that passes over what others read.

    What decoders make an ``OSError`` of has no number; a dataset may well raise one by itself that has none.
    """
    cause = error.__cause__
    return isinstance(error, OSError) or (isinstance(cause, OSError) and cause.errno is not None)


def decode(data: bytes, name: str, short_side: int = 0, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture as (3, H, W) uint8.

    Transparency is composited on white, the first frame of an animation stands for it, 16-bit grey is
    scaled to 8, and the EXIF orientation is applied.

    Args:
        data: the file.
        name: what a message calls it.
        short_side: the picture is shrunk by a whole factor that leaves its short side this long at least,
            which costs next to nothing; 0 keeps it as it is.
        max_pixels: a larger picture is refused from its header, before anything is decoded.

    Raises:
        BadSample: the picture is broken, too large or no picture.
    """
    if not data:
        raise BadSample("empty file", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the header is checked below; PIL's warnings would repeat it
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadSample("not a picture", name) from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        too_large = isinstance(error, Image.DecompressionBombError)
        raise BadSample("too large" if too_large else "broken header", name, str(error)) from error
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise BadSample("too large", name, f"{size}, the limit is {max_pixels} pixels")
    try:
        return to_tensor(image, short_side)
    except BROKEN as error:
        reason = "truncated" if "truncated" in str(error).lower() else "broken picture"
        raise BadSample(reason, name, str(error)) from error


def to_tensor(image: Image.Image, short_side: int = 0) -> Tensor:
    """An opened picture as (3, H, W) uint8."""
    if short_side and image.format == "JPEG":
        scale = short_side / min(image.size)
        image.draft(image.mode, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    image = on_white(ImageOps.exif_transpose(image))
    if short_side and (factor := min(image.size) // short_side) > 1:
        image = image.reduce(factor)
    pixels = np.asarray(image).transpose(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    return torch.from_numpy(np.array(pixels, order="C"))


def on_white(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):  # 16-bit grey; PIL would clip at 255 instead of scaling
        grey = np.asarray(image, dtype=np.float32)
        return Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        white.alpha_composite(rgba)
        return white.convert("RGB")
    return image.convert("RGB")
