"""Views of images: plain crops for CLIP and reconstruction, DINOv2's augmented ones, a centre for probes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from vtp_core.data import colour
from vtp_plugins.spec import Spec

DINO_SIDE = 224  # the size for which DINOv2 states its blur
TRIES = 10


def as_image(value: Any) -> Tensor:
    """A picture as (3, H, W) uint8; grey is repeated."""
    if isinstance(value, Image.Image):
        value = pil_to_tensor(value.convert("RGB"))
    if not isinstance(value, Tensor):
        raise ValueError(f"an image view reads a PIL image or a tensor, not {type(value).__name__}")
    if value.dtype != torch.uint8 or value.ndim != 3 or value.shape[0] not in (1, 3):
        raise ValueError(f"an image view reads uint8 (3, H, W), not {value.dtype} {tuple(value.shape)}")
    return value.expand(3, -1, -1)


def resized(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    """The box (top, left, height, width) of an image, antialiased bicubic, (1, 3, H, W) uint8."""
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width]
    if (height, width) == size:
        return part
    return F.interpolate(part, size=size, mode="bicubic", antialias=True)


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A box of random area and aspect, as torchvision's RandomResizedCrop draws it."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    draws = torch.rand(TRIES, 4).tolist()  # one call: small draws cost more than the numbers
    for area, aspect, down, right in draws:
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        stretch = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(pixels * stretch)), round(math.sqrt(pixels / stretch))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    shape = width / height
    w = width if shape <= ratio[1] else round(height * ratio[1])
    h = height if shape >= ratio[0] else round(width / ratio[0])
    return (height - h) // 2, (width - w) // 2, h, w


def sides(spec: Spec | None, size: int | tuple[int, ...] | None) -> tuple[int, int]:
    """Height and width of a view: what is written, else the stack's own."""
    if size is None:
        if spec is None or len(spec.size) != 2:
            raise ValueError("views: an image view needs a size (height, width), or a spec that has one")
        return spec.size[0], spec.size[1]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_range(name: str, values: tuple[float, float], top: float = math.inf) -> None:
    """Refuse a range that is empty or leaves (0, top]."""
    if not 0 < values[0] <= values[1] <= top:
        raise ValueError(f"views: {name} is a range with 0 < low <= high <= {top:g}, not {values}")


@dataclass(frozen=True)
class Plain:
    """A light random crop: what CLIP and reconstruction read.

    Args:
        spec: gives the size when none is written.
        size: side, or (height, width), in pixels.
        scale: share of the picture's area, low and high.
        ratio: aspect of the box, low and high.
        flip: probability of a horizontal flip.
        field: raw field that is read.
    """

    spec: InitVar[Spec | None] = None
    _: KW_ONLY
    size: int | tuple[int, int] | None = None
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    crops: int | None = dataclasses.field(default=1, init=False)
    field: str = "image"

    def __post_init__(self, spec: Spec | None) -> None:
        object.__setattr__(self, "size", sides(spec, self.size))
        check_range("scale", self.scale, 1.0)
        check_range("ratio", self.ratio)

    def __call__(self, value: Any) -> Tensor:
        """(1, 3, H, W) uint8."""
        image = as_image(value)
        box = random_box(image.shape[1], image.shape[2], self.scale, self.ratio)
        crop = resized(image, box, sides(None, self.size))
        return crop.flip(-1) if self.flip and torch.rand(()).item() < self.flip else crop


@dataclass(frozen=True)
class Centre:
    """The short side scaled to size and the centre cut out: what probes read; nothing is random.

    Args:
        size: side, or (height, width), in pixels.
        field: raw field that is read.
    """

    size: int | tuple[int, ...]
    crops: int | None = dataclasses.field(default=1, init=False)
    field: str = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sides(None, self.size))

    def __call__(self, value: Any) -> Tensor:
        """(1, 3, H, W) uint8."""
        image = as_image(value)
        height, width = sides(None, self.size)
        scale = max(height / image.shape[1], width / image.shape[2])
        around = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
        whole = resized(image, (0, 0, image.shape[1], image.shape[2]), around)
        top, left = (around[0] - height) // 2, (around[1] - width) // 2
        return whole[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class Crops:
    """Several random crops with DINOv2's flips, colour jitter, greyscale, blur and solarization.

    ``blur`` and ``solarize`` hold one probability per crop; the last one stands for all that follow.

    Args:
        spec: gives the size when none is written.
        crops: K, crops per picture.
        size: side, or (height, width), in pixels.
        scale: share of the picture's area, low and high.
        ratio: aspect of the box, low and high.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast, saturation and hue; hue in turns, at most 0.5.
        jitter_probability: probability of the jitter.
        greyscale: probability of dropping colour.
        blur: probability of a blur.
        blur_sigma: standard deviation of the blur in pixels, low and high.
        blur_taps: taps of the blur along an axis, odd.
        solarize: probability of solarization.
        solarize_threshold: brightness in 0..255 from which solarization inverts.
        field: raw field that is read.
    """

    spec: InitVar[Spec | None] = None
    _: KW_ONLY
    crops: int | None = 2
    size: int | tuple[int, int] | None = None
    scale: tuple[float, float] = (0.32, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    greyscale: float = 0.2
    blur: tuple[float, ...] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_taps: int = 9
    solarize: tuple[float, ...] = (0.0, 0.2)
    solarize_threshold: int = 128
    field: str = "image"

    def __post_init__(self, spec: Spec | None) -> None:
        object.__setattr__(self, "size", sides(spec, self.size))
        check_range("scale", self.scale, 1.0)
        check_range("ratio", self.ratio)
        check_range("blur_sigma", self.blur_sigma)
        if not self.crops or self.crops < 1:
            raise ValueError(f"views: crops counts at least 1, not {self.crops}")
        if self.blur_taps % 2 == 0 or self.blur_taps // 2 >= min(sides(None, self.size)):
            raise ValueError(f"views: blur_taps is odd and below twice the side, not {self.blur_taps}")

    def __call__(self, value: Any) -> Tensor:
        """(K, 3, H, W) uint8."""
        image = as_image(value)
        count = self.crops or 1
        size = sides(None, self.size)
        parts = []
        for _ in range(count):
            crop = resized(image, random_box(image.shape[1], image.shape[2], self.scale, self.ratio), size)
            parts.append(crop.flip(-1) if torch.rand(()).item() < self.flip else crop)
        return self._recolour(torch.cat(parts))

    def _recolour(self, crops: Tensor) -> Tensor:
        """Jitter, greyscale, blur and solarization, drawn per crop; the order of the jitter per picture."""
        count = len(crops)
        draws = torch.rand(9, count).tolist()  # one call: small draws cost more than the numbers
        rows = ((self.jitter_probability,), (self.greyscale,), self.blur, self.solarize)
        chances = [per_crop(row, count) for row in rows]
        jitter, grey, blurred, inverted = (
            [draw < chance for draw, chance in zip(row, chance, strict=True)]
            for row, chance in zip(draws[:4], chances, strict=True)
        )
        order = torch.rand(4).argsort().tolist()
        if not any(jitter + grey + blurred + inverted):
            return crops
        x = crops.float()
        if any(jitter):
            x = self._jitter(x, jitter, draws[4:8], order)
        if any(grey):
            x = colour.saturation(x, [0.0 if chosen else 1.0 for chosen in grey])
        for i in range(count):
            if blurred[i]:
                low, high = self.blur_sigma
                x[i : i + 1] = colour.blur(x[i : i + 1], low + (high - low) * draws[8][i], self.blur_taps)
            if inverted[i]:
                x[i] = colour.solarize(x[i], self.solarize_threshold)
        return x.round_().clamp_(0, 255).to(torch.uint8)

    def _jitter(self, x: Tensor, chosen: list[bool], draws: list[list[float]], order: list[int]) -> Tensor:
        steps = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
        for i in order:
            if strength := self.jitter[i]:
                shifts = [strength * (2 * draw - 1) * on for draw, on in zip(draws[i], chosen, strict=True)]
                x = steps[i](x, shifts if i == 3 else [max(0.0, 1 + shift) for shift in shifts])
        return x


def per_crop(values: Sequence[float], count: int) -> list[float]:
    """One value per crop: the last one stands for all that follow."""
    return [values[min(i, len(values) - 1)] for i in range(count)] if values else [0.0] * count


def odd(value: float) -> int:
    """The nearest odd number that is at least 3."""
    return max(3, 2 * round((value - 1) / 2) + 1)


def global_crops(spec: Spec, **options: Any) -> Crops:
    """DINOv2's two global crops at the stack's size; the blur scales with the side. ``options`` win."""
    scale = max(sides(spec, options.get("size"))) / DINO_SIDE
    blur = {"blur_sigma": (0.1 * min(1.0, scale), 2.0 * scale), "blur_taps": odd(9 * scale)}
    return Crops(spec, **{**blur, **options})


def local_side(spec: Spec) -> tuple[int, int]:
    """Three sevenths of the stack's size (96 of 224), up to whole patches."""
    patches = [-(-3 * side // (7 * patch)) for side, patch in zip(spec.size, spec.patch, strict=True)]
    return patches[0] * spec.patch[0], patches[1] * spec.patch[1]


def local_crops(spec: Spec, count: int = 8, **options: Any) -> Crops:
    """DINOv2's local crops: ``count`` small boxes at :func:`local_side`. ``options`` win."""
    size = sides(None, options.get("size") or local_side(spec))
    scale = max(size) / 96  # DINOv2 blurs its 96 px crops as it does the 224 px ones
    ours = {
        "crops": count,
        "scale": (0.05, 0.32),
        "blur": (0.5,),
        "solarize": (0.0,),
        "blur_sigma": (0.1 * min(1.0, scale), 2.0 * scale),
        "blur_taps": odd(9 * scale),
    }
    return Crops(spec, **{**ours, **options, "size": size})
