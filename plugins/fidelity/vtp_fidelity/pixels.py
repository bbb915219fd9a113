"""Bytes of generated images and crops of real ones, by the conventions that published numbers rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize

Rounding = Literal["round", "truncate", "adm"]
Crop = Literal["adm", "square", "bilinear"]

_BYTES: Mapping[str, Callable[[Tensor], Tensor]] = {
    # of y in [0, 2], which is x + 1 for x in [-1, 1]; the orders of operations are the references'
    "round": lambda y: (y / 2 * 255 + 0.5).clamp(0, 255),
    "truncate": lambda y: (y / 2).clamp(0, 1) * 255,
    "adm": lambda y: (127.5 * (y - 1) + 128).clamp(0, 255),
}


def to_bytes(images: Tensor, rounding: Rounding = "round", low: float = 0.0) -> Tensor:
    """Float images as uint8; uint8 images pass through.

    Args:
        images: any shape, in [low, 1]; what lies outside is clamped.
        rounding: ``round``, to the nearest byte, halves up (DDT, ``save_image``); ``truncate``, downwards,
            half a byte darker on average (REPA, REPA-E, RAE); ``adm``, 127.5 x + 128 truncated for x in
            [-1, 1] (DiT, SiT, LightningDiT), which is ``round`` but for float errors at halves.
        low: 0 or -1.

    Raises:
        ArithmeticError: some pixels are not finite.
    """
    if images.dtype == torch.uint8:
        return images
    x = images.detach().float()
    if not x.isfinite().all():
        raise ArithmeticError("some pixels are not finite")
    if rounding == "adm" and low == -1:
        return (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
    return _BYTES[rounding](x + 1 if low == -1 else 2 * x).to(torch.uint8)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (arXiv 2105.05233): halve with a box, then bicubic, then cut the middle square.

    Args:
        image: RGB, of any size; a smaller one is enlarged.
        size: side of the square.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = round(image.width * scale), round(image.height * scale)
    return _middle(image.resize(sides, Image.Resampling.BICUBIC), size)


def square_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest middle square, resized with Lanczos: what the data tool of EDM and REPA writes."""
    square = _middle(image, min(image.size))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def bilinear_crop(image: Image.Image, size: int) -> Image.Image:
    """torchvision's ``Resize`` (antialiased bilinear) and ``CenterCrop`` on a picture."""
    cropped: Image.Image = center_crop(resize(image, [size]), [size, size])
    return cropped


CROPS: Mapping[Crop, Callable[[Image.Image, int], Image.Image]] = {
    "adm": adm_crop,
    "square": square_crop,
    "bilinear": bilinear_crop,
}


def _middle(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
