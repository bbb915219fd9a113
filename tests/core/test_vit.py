from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.models.rope import Rope
from vtp_core.models.vit import ViT
from vtp_plugins.spec import Spec

ROWS, PATCHES = 6, 6


def vit(**options: Any) -> ViT:
    """A small encoder of 3 x 2 patches in float64, whose parameters are all of order one tenth or more."""
    torch.manual_seed(0)
    options = {"patch": 4, "image_size": (12, 8), "width": 16, "depth": 3, "heads": 2} | options
    model = ViT(Spec(), **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return model


def images(rows: int = ROWS, size: tuple[int, int] = (12, 8)) -> Tensor:
    return torch.randn(rows, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks() -> Tensor:
    return torch.rand(ROWS, PATCHES, generator=torch.Generator().manual_seed(2)) < 0.4


WANTS: list[dict[str, int]] = [
    {"cls": 6},
    {"cls": 6, "patches": 2},
    {"cls": 2, "patches": 6},
    {"cls": 6, "patches@ibot": 6},
    {"patches@ibot": 6},
    {"cls": 6, "patches": 2, "patches@ibot": 6},
    {"cls": 6, "patches": 6, "patches@ibot": 6, "patches@again": 6},
    {"cls": 6, "patches@ibot": 6, "patches@again": 6},
    {"cls": 4, "hidden:3": 2},
    {"cls": 2, "hidden:1": 6, "hidden:2": 3},
    {"hidden:2": 5},
]


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("want", WANTS, ids=lambda want: " ".join(f"{k}={v}" for k, v in want.items()))
def test_only_what_is_read_is_computed_with_the_same_values_and_gradients(
    want: dict[str, int], drop: float
) -> None:
    model, mask = vit(qk_norm=True), masks()
    places = mask.flatten().nonzero().squeeze(1)
    select = {"ibot": places, "again": places.flip(0)[:3]}
    everything = {"cls": ROWS, "patches": ROWS, "hidden:1": ROWS, "hidden:2": ROWS, "hidden:3": ROWS}
    clock = StepClock(seed=3)
    full = model(images(), want=everything, mask=mask, drop=drop, clock=clock)
    full |= {f"patches@{name}": full["patches"].flatten(0, 1)[at] for name, at in select.items()}
    expected = {k: v if "@" in k else v[: want[k]] for k, v in full.items() if k in want}
    got = model(images(), want=want, mask=mask, select=select, drop=drop, clock=clock)
    assert got.keys() == want.keys()
    grads = []
    for outputs in (expected, got):
        loss = torch.stack(
            [(outputs[k] * torch.linspace(1, 2, outputs[k].numel()).view_as(outputs[k])).sum() for k in want]
        )
        grads.append(torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)
    for ours, whole in zip(*grads, strict=True):
        zero = torch.zeros(()) if whole is None else torch.zeros_like(whole)
        torch.testing.assert_close(
            zero if ours is None else ours, zero if whole is None else whole, rtol=1e-8, atol=1e-8
        )


def tokens_through_last_ffn(model: ViT, want: dict[str, int], **given: Any) -> int:
    seen = []
    block = model.blocks[-1]
    handle = block.get_submodule("mlp").register_forward_pre_hook(
        lambda _, args: seen.append(args[0][..., 0].numel())
    )
    model(images(), want=want, **given)
    handle.remove()
    return sum(seen)


def test_the_last_block_evaluates_the_tokens_that_are_read_and_no_others() -> None:
    model = vit()
    assert tokens_through_last_ffn(model, {"cls": 6}) == 6
    assert tokens_through_last_ffn(model, {"cls": 6, "patches": 2}) == 2 * 7 + 4
    places = torch.tensor([0, 3, 20])
    assert tokens_through_last_ffn(model, {"cls": 6, "patches@a": 6}, select={"a": places}) == 9
    assert tokens_through_last_ffn(model, {"hidden:2": 6}) == 0


@pytest.mark.parametrize("size", [(12, 8), (8, 20), (4, 4)])
def test_any_multiple_of_the_patch_encodes(size: tuple[int, int]) -> None:
    model = vit()
    got = model(images(2, size))
    assert got["patches"].shape == (2, size[0] * size[1] // 16, 16)
    assert model.grid_of(size) == (size[0] // 4, size[1] // 4)


@pytest.mark.parametrize("size", [(12, 10), (13, 8), (2, 8)])
def test_a_size_that_the_patch_does_not_divide_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"encoder.image_size: .* is not a multiple of encoder.patch 4 x 4"):
        vit()(images(2, size))
    with pytest.raises(ValueError, match=r"encoder\.image_size"):
        vit(image_size=size)


def test_an_unknown_output_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(LookupError, match=r"'hidden:4'.*hidden:k, k up to 3"):
        vit()(images(), want={"hidden:4": 1})
    with pytest.raises(LookupError, match="patches@ibot: no places"):
        vit()(images(), want={"patches@ibot": 1})


def test_heads_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="heads: 3 does not divide"):
        vit(heads=3)
    with pytest.raises(ValueError, match="heads: 2 channels per head"):
        vit(heads=8)


def test_an_encoder_of_one_axis_reads_waveforms() -> None:
    spec = Spec(modality="audio", signal_channels=1, size=(64,), patch=(8,))
    got = ViT(spec, patch=8, image_size=64, width=16, depth=1, heads=2)(torch.randn(2, 1, 64))
    assert got["patches"].shape == (2, 8, 16)


def test_patches_are_embedded_as_a_strided_convolution_does() -> None:
    model = vit()
    weight = model.patch_embed.proj.weight.unflatten(1, (3, 4, 4))
    expected = nn.functional.conv2d(images(), weight, model.patch_embed.proj.bias, stride=4)
    torch.testing.assert_close(model.patch_embed(images()), expected.flatten(2).transpose(1, 2))


def test_the_mask_token_replaces_hidden_patches() -> None:
    model, mask = vit(), masks()
    seen = images()
    hidden = mask.view(ROWS, 1, 3, 1, 2, 1).expand(-1, 3, -1, 4, -1, 4).reshape(ROWS, 3, 12, 8)
    changed = torch.where(hidden, seen + 1, seen)
    torch.testing.assert_close(model(seen, mask=mask)["cls"], model(changed, mask=mask)["cls"])
    assert not torch.allclose(model(seen)["cls"], model(changed)["cls"])


def test_drop_path_needs_training_a_clock_and_a_rate() -> None:
    model, clock = vit(drop_path=0.5), StepClock(seed=1)
    plain = model(images())["cls"]
    assert not torch.allclose(model(images(), clock=clock)["cls"], plain)
    torch.testing.assert_close(model(images(), clock=clock, drop=0.0)["cls"], plain)
    torch.testing.assert_close(model.eval()(images(), clock=clock)["cls"], plain)


def test_drop_path_scales_what_is_kept() -> None:
    """With one block and no feed-forward, a row is either untouched or has its branch doubled."""
    model = vit(depth=1, layer_scale=1.0, drop_path=0.5)
    nn.init.zeros_(model.blocks[0].get_submodule("ls2").gamma)
    start = model._embed(images(), None)[:, 1:]
    branch = model(images(), want={"hidden:1": ROWS}, drop=0.0)["hidden:1"] - start
    dropped = model(images(), want={"hidden:1": ROWS}, clock=StepClock(seed=5))["hidden:1"] - start
    kept = [torch.allclose(row, 2 * whole) for row, whole in zip(dropped, branch, strict=True)]
    assert 0 < sum(kept) < ROWS
    assert all(keep or not row.any() for keep, row in zip(kept, dropped, strict=True))


def test_drop_path_meets_a_row_alike_for_any_number_of_processes() -> None:
    """Two crops of each of three samples, of which two processes have one and two."""
    model = vit(drop_path=0.5)
    whole = model(images(), clock=StepClock(seed=1).of("encoder", crops=2))["patches"]
    crops = images().unflatten(0, (3, 2))
    for rank in range(2):
        clock = StepClock(seed=1, world=2, rank=rank).of("encoder", crops=2)
        mine = model(crops[rank::2].flatten(0, 1), clock=clock)["patches"]
        torch.testing.assert_close(mine, whole.unflatten(0, (3, 2))[rank::2].flatten(0, 1))


def test_shapes_are_known_without_values() -> None:
    """A plan counts forwards on the meta device."""
    with torch.device("meta"):
        model = vit()
        got = model(
            torch.empty(6, 3, 12, 8, dtype=torch.float64),
            want={"cls": 6, "patches": 2, "hidden:1": 1},
            mask=torch.empty(6, 6, dtype=torch.bool),
        )
        assert got["cls"].shape == (6, 16)
        assert got["patches"].shape == (2, 6, 16)
        places = {"ibot": torch.empty(9, dtype=torch.int64)}
        got = model(images().to("meta"), want={"cls": 6, "patches@ibot": 6}, select=places)
        assert got["patches@ibot"].shape == (9, 16)


def test_a_step_in_which_every_row_is_dropped_passes_gradient() -> None:
    model = vit(drop_path=0.999)
    got = model(images(), want={"cls": 6, "patches": 2}, clock=StepClock())
    sum(value.sum() for value in got.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_tables_made_in_inference_mode_serve_training() -> None:
    model = vit()
    with torch.inference_mode():
        model(images())
    model(images())["cls"].sum().backward()


def test_tables_are_computed_once_per_grid() -> None:
    rope, like = Rope(8, 2), torch.zeros(1)
    assert rope.tables((2, 3), like) is rope.tables((2, 3), like)
    assert rope.tables((3, 2), like) is not rope.tables((2, 3), like)
    assert rope.tables((2, 3), like.double()).cos.dtype == torch.float64


@pytest.mark.parametrize("rope", ["float32", "bfloat16"])
def test_autocast_to_bfloat16_keeps_close(rope: str) -> None:
    model = vit(rope_dtype=rope).float()
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, want={"cls": 6, "patches": 2})
        sum(value.float().sum() for value in got.values()).backward()
    whole = model(x, want={"cls": 6, "patches": 2})
    for name, value in whole.items():
        assert (got[name] - value).norm() < 0.05 * value.norm()


def test_the_dials_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        for dial, parameters in {"s": 21_611_520, "b": 85_690_368, "l": 303_542_528}.items():
            model = ViT(Spec(), **ViT.sizes[dial], qk_norm=False)
            width, bottleneck = model.width, 64
            assert sum(p.numel() for p in model.parameters()) + width * bottleneck == parameters


def test_the_anchor_is_a_parameter_of_the_last_block() -> None:
    model = vit()
    assert model.anchors["last"] is dict(model.named_parameters())["blocks.2.mlp.w3.weight"]
    assert vit(ffn="mlp").anchors["last"].shape == (16, 64)
