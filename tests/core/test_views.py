"""Views: right shapes, torchvision's colours, draws out of the generator, defaults that follow the size."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from vtp_core.data import colour
from vtp_core.data.views import Centre, Crops, Plain, global_crops, local_crops, local_side, random_box
from vtp_plugins.protocols import View
from vtp_plugins.spec import Spec

SPEC = Spec(size=(64, 64), patch=(8, 8))


def picture(height: int = 48, width: int = 80, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (1, 3, 6, 10), generator=generator).float()
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear")[0].to(torch.uint8)


@pytest.mark.parametrize("view", [Plain(SPEC), Centre(64), global_crops(SPEC), local_crops(SPEC, 3)])
def test_a_view_gives_k_uint8_crops_of_its_size(view: View) -> None:
    crops = view(picture())
    side = 32 if view.crops == 3 else 64
    assert crops.shape == (view.crops, 3, side, side)
    assert crops.dtype == torch.uint8
    assert isinstance(view, View)


def test_equal_definitions_are_equal_however_they_are_written() -> None:
    assert Plain(SPEC) == Plain(size=64) == Plain(size=(64, 64))
    assert len({Plain(SPEC), Plain(size=64)}) == 1
    assert Plain(SPEC) != Plain(SPEC, scale=(0.5, 1.0))
    assert Crops(SPEC) == Crops(Spec(size=(64, 64), patch=(4, 4)))


def test_the_generator_decides_everything() -> None:
    for view in (Plain(SPEC), global_crops(SPEC), local_crops(SPEC)):
        torch.manual_seed(3)
        first = view(picture(60, 64))
        torch.manual_seed(3)
        assert torch.equal(first, view(picture(60, 64)))
        assert not torch.equal(first, view(picture(60, 64)))


def test_a_pil_image_a_grey_tensor_and_a_tiny_source_are_read() -> None:
    image = Image.fromarray(picture().permute(1, 2, 0).numpy())
    assert torch.equal(Centre(32)(image), Centre(32)(picture()))
    assert Plain(size=16)(picture()[:1]).shape == (1, 3, 16, 16)
    assert local_crops(SPEC, 2)(picture(5, 3)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("value", [torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8), "photo.png"])
def test_anything_but_a_picture_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="image view reads"):
        Plain(size=8)(value)


def test_the_centre_is_torchvisions_resize_and_centre_crop() -> None:
    for size in ((32, 32), (24, 40)):
        scale = max(size[0] / 48, size[1] / 80)
        resized = F.resize(picture(), [round(48 * scale), round(80 * scale)], F.InterpolationMode.BICUBIC)
        assert torch.equal(Centre(size)(picture())[0], F.center_crop(resized, list(size)))


def test_boxes_stay_inside_and_cover_the_area_asked_for() -> None:
    areas = []
    for _ in range(2000):
        top, left, height, width = random_box(60, 60, (0.3, 0.6), (3 / 4, 4 / 3))
        assert top >= 0 <= left
        assert top + height <= 60 >= left + width
        areas.append(height * width / 3600)
    assert min(areas) > 0.28
    assert max(areas) < 0.62
    assert sum(areas) / len(areas) == pytest.approx(0.45, abs=0.01)


def test_a_box_that_never_fits_falls_back_to_the_middle() -> None:
    assert random_box(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 493, 10, 13)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (colour.brightness, F.adjust_brightness, [0.6, 1.0, 1.4]),
        (colour.contrast, F.adjust_contrast, [0.6, 1.0, 1.4]),
        (colour.saturation, F.adjust_saturation, [0.0, 1.0, 1.7]),
        (colour.hue, F.adjust_hue, [-0.5, 0.0, 0.1]),
    ],
)
def test_colours_are_torchvisions(ours: object, theirs: object, values: list[float]) -> None:
    x = torch.stack([picture(seed=i) for i in range(3)]).float()
    found = ours(x, values)  # type: ignore[operator]
    for i, value in enumerate(values):
        assert torch.allclose(found[i], 255 * theirs(x[i] / 255, value), atol=2e-2)  # type: ignore[operator]


@pytest.mark.parametrize(("taps", "sigma"), [(3, 0.5), (9, 1.7)])
def test_the_blur_is_torchvisions(taps: int, sigma: float) -> None:
    x = picture().float()[None]
    assert torch.allclose(
        colour.blur(x, sigma, taps), F.gaussian_blur(x, [taps, taps], [sigma, sigma]), atol=1e-3
    )


def test_solarize_inverts_bright_places_only() -> None:
    x = torch.tensor([0.0, 127.0, 128.0, 255.0])
    assert colour.solarize(x, 128).tolist() == [0.0, 127.0, 127.0, 0.0]


def test_each_augmentation_can_be_turned_off_and_on_per_crop() -> None:
    plain = {"jitter_probability": 0.0, "greyscale": 0.0, "blur": (0.0,), "solarize": (0.0,), "flip": 0.0}
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    image = picture(32, 32)
    untouched = Crops(size=32, **plain, **whole)(image)  # type: ignore[arg-type]
    assert torch.equal(untouched, torch.stack([image, image]))
    flipped = Crops(size=32, **{**plain, **whole, "flip": 1.0})(image)  # type: ignore[arg-type]
    assert torch.equal(flipped[0], image.flip(-1))
    second = Crops(size=32, **{**plain, **whole, "solarize": (0.0, 1.0)})(image)  # type: ignore[arg-type]
    assert torch.equal(second[0], image)
    assert torch.equal(second[1], F.solarize(image, 128))
    grey = Crops(size=32, **{**plain, **whole, "greyscale": 1.0})(image)  # type: ignore[arg-type]
    assert (grey[:, 0] == grey[:, 1]).all()
    assert (grey[0] - F.rgb_to_grayscale(image, 3)).abs().max() in (0, 1, 255)


def test_global_and_local_defaults_scale_with_the_size() -> None:
    large = Spec(size=(224, 224), patch=(16, 16))
    assert global_crops(large).blur_taps == 9
    assert global_crops(large).blur_sigma == (0.1, 2.0)
    assert local_crops(large) == Crops(
        crops=8, size=96, scale=(0.05, 0.32), blur=(0.5,), solarize=(0.0,), blur_sigma=(0.1, 2.0), blur_taps=9
    )
    sides = [local_side(Spec(size=(s, s), patch=(p, p)))[0] for s, p in ((64, 8), (256, 16), (512, 16))]
    assert sides == [32, 112, 224]
    assert global_crops(SPEC, scale=(0.5, 1.0)).scale == (0.5, 1.0)
    assert global_crops(SPEC).blur_taps == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"crops": 0}, "crops"),
        ({"blur_taps": 4}, "blur_taps"),
    ],
)
def test_a_senseless_option_is_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Crops(size=32, **options)  # type: ignore[arg-type]


def test_a_view_without_any_size_says_so() -> None:
    with pytest.raises(ValueError, match="needs a size"):
        Plain()


def test_local_crops_are_small_whether_or_not_a_size_is_passed() -> None:
    spec = Spec(size=(64, 64), patch=(8, 8))
    assert local_crops(spec, 4) == local_crops(spec, 4, size=None)
    assert local_crops(spec, 4, size=None).size == (32, 32)
    assert local_crops(spec, 4, size=24).size == (24, 24)
