"""Bytes and crops, byte for byte against those of the public systems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vtp_fidelity.pixels import CROPS, Rounding, adm_crop, to_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "adm_preprocess"
REFERENCES: dict[str, Rounding] = {
    "ddt": "round",
    "save_image_style": "round",
    "repa_repae": "truncate",
    "rae": "truncate",
    "dit_sit_lightningdit": "adm",
}


@pytest.mark.parametrize(("reference", "rounding"), REFERENCES.items())
def test_bytes_are_those_of_the_system_whose_convention_it_is(reference: str, rounding: Rounding) -> None:
    stored = load_file(GOLDEN / "convert.safetensors")
    x, expected = stored["in.x"], stored[f"out.{reference}"]
    assert torch.equal(to_bytes(x, rounding, low=-1), expected)
    assert torch.equal(to_bytes((x + 1) / 2, rounding), expected)


def test_rounding_keeps_bytes_and_truncating_loses_some() -> None:
    u = torch.arange(256, dtype=torch.uint8)
    x = (u / 255 - 0.5) / 0.5
    assert torch.equal(to_bytes(x, "round", low=-1), u)
    assert torch.equal(to_bytes(x, "adm", low=-1), u)
    lost = int((to_bytes(x, "truncate", low=-1) != u).sum())
    assert lost == load_file(GOLDEN / "convert.safetensors")["out.round_trip_errors.repa_repae"].item()
    assert to_bytes(u) is u


def test_pixels_that_are_not_finite_have_no_bytes() -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        to_bytes(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize(
    ("crop", "key"), [("adm", "adm"), ("square", "square_lanczos"), ("bilinear", "resize_centercrop_pil")]
)
def test_crops_agree_byte_for_byte(crop: str, key: str) -> None:
    stored = load_file(GOLDEN / "crop.safetensors")
    for i in range(9):
        image = Image.fromarray(stored[f"in.image{i}"].numpy())
        found = np.asarray(CROPS[crop](image, 32))  # type: ignore[index]
        assert np.array_equal(found, stored[f"out.{key}{i}"].numpy()), f"image {i}"


def test_a_crop_of_a_square_of_its_own_size_is_that_square() -> None:
    pixels: Tensor = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8)
    assert np.array_equal(np.asarray(adm_crop(Image.fromarray(pixels.numpy()), 24)), pixels.numpy())
