from __future__ import annotations

import torch
from torchvision.transforms import v2

from vtp_core.modalities import Image
from vtp_plugins.protocols import Modality


def test_an_image_is_a_modality() -> None:
    image = Image()
    assert isinstance(image, Modality)
    assert (image.channels, image.axes) == (3, 2)


def test_bytes_and_floats_become_what_torchvision_makes_of_them() -> None:
    x = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    expected = v2.functional.normalize(x.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(Image().normalise(x), expected)
    torch.testing.assert_close(Image().normalise(x.float() / 255), expected)


def test_display_is_the_inverse_unclamped_and_keeps_float64() -> None:
    x = 3 * torch.rand(2, 4, 3, 5, 6, dtype=torch.float64) - 1
    back = Image().to_display(Image().normalise(x))
    assert back.dtype == torch.float64
    torch.testing.assert_close(back, x)


def test_bytes_are_not_changed() -> None:
    x = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    Image().normalise(x)
    assert (x == 7).all()
