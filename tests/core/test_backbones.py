"""Frozen backbones: what they hand out, that gradient passes, and what is said where weights lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vtp_core import weights
from vtp_core.errors import DataFault
from vtp_core.modalities import Image
from vtp_core.nn import lite0
from vtp_core.nn.backbones import Lite0, ViT, backbone, load, tiny

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def test_a_vit_hands_out_patch_tokens_after_its_blocks() -> None:
    network: Any = tiny(**SHAPE)
    x = picture(2, 3, 40, 24)
    frozen = ViT(network, (3, 1, 3))
    given = frozen(x)
    assert [tuple(tap.shape) for tap in given] == [(2, 16, 16)] * 3
    assert frozen.widths == (16, 16, 16)
    sized = F.interpolate((x + 1) / 2, (32, 32), mode="bilinear")
    tokens = network._pos_embed(network.patch_embed(Image().normalise(sized)))
    for index, block in enumerate(network.blocks, 1):
        tokens = block(tokens)
        if index in (1, 3):
            torch.testing.assert_close(given[1 if index == 1 else 0], tokens[:, 1:].transpose(1, 2))
    assert torch.equal(given[0], given[2])


def test_lite0_hands_out_maps_and_its_pooled_ones_are_the_networks_features() -> None:
    network = lite0.Lite0().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
    frozen, x = Lite0(network, (3, 11)), picture(2, 3, 64, 64)
    shallow, deep = frozen(x)
    assert shallow.shape == (2, 24, 256) and deep.shape == (2, 112, 16)
    assert frozen.widths == (24, 112)
    torch.testing.assert_close(deep.mean(2), network((x + 1) / 2), rtol=1e-4, atol=1e-5)
    assert Lite0(network, (3,), side=96)(x)[0].shape == (2, 24, 576)


def test_it_never_leaves_eval_mode_and_never_trains() -> None:
    frozen = backbone("random", allow_random=True).train()
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())


def test_gradient_passes_twice() -> None:
    frozen = backbone("random", allow_random=True)
    x = picture(1, 3, 32, 32).requires_grad_()
    score = sum(tap.square().mean() for tap in frozen(x))
    (grad,) = torch.autograd.grad(score, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad.abs().sum() > 0 and second.abs().sum() > 0


def test_building_draws_nothing_and_random_is_always_the_same() -> None:
    before = torch.random.get_rng_state()
    one, two = (backbone("random", allow_random=True).state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(("name", "message"), [("dino", "no 'dino'"), ("random", "allow_random_backbone")])
def test_names_without_meaning_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(name)


@pytest.mark.parametrize("name", ["lite0", "dino_s8", "dinov2_s14"])
def test_missing_weights_say_where_to_put_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(DataFault, match=f"{tmp_path}/weights/{name}.safetensors") as caught:
        backbone(name)
    assert caught.value.code == 4
    if name == "dino_s8":
        assert "dino_deitsmall8_pretrain.pth" in str(caught.value)
    with pytest.raises(DataFault, match="no weights at nowhere"):
        backbone(name, file="nowhere")


def test_a_vit_is_filled_from_a_file_whatever_its_side(tmp_path: Path) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    tensors = {key: torch.rand(value.shape) for key, value in network.state_dict().items()}
    save_file({**tensors, "head.weight": torch.zeros(2, 384)}, tmp_path / "dino.safetensors")
    frozen = backbone("dino_s16", file=tmp_path / "dino.safetensors", taps=(2,), side=64)
    assert frozen(picture(1, 3, 32, 32))[0].shape == (1, 384, 16)  # a classifier is let go
    assert torch.equal(frozen.state_dict()["network.blocks.1.mlp.fc1.bias"], tensors["blocks.1.mlp.fc1.bias"])


def test_a_pth_file_does_too(tmp_path: Path) -> None:
    network = lite0.Lite0()
    torch.save({"model": network.state_dict()}, tmp_path / "lite0.pth")
    frozen = backbone("lite0", file=tmp_path / "lite0.pth").state_dict()
    assert all(torch.equal(value, frozen[f"network.{key}"]) for key, value in network.state_dict().items())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    network = tiny(**SHAPE)
    with pytest.raises(DataFault, match=r"no state dict of this network: .*lack or differ"):
        load(tiny(**{**SHAPE, "embed_dim": 32}), network.state_dict(), "here")
    (tmp_path / "a.pth").write_bytes(b"no weights")
    with pytest.raises(DataFault, match="no file of weights"):
        backbone("dino_s8", file=tmp_path / "a.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(DataFault, match="no state dict of EfficientNet-Lite0"):
        backbone("lite0", file=tmp_path / "a.safetensors")


def test_the_real_lite0_tells_a_picture_from_noise() -> None:
    try:
        weights.path("lite0")
    except DataFault as missing:
        pytest.skip(str(missing))
    frozen = backbone("lite0", taps=(11,))
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    shifted, noise = ramp.flip(2), picture(1, 3, 64, 64)
    a, b, c = (frozen(x)[0].mean(2) for x in (ramp, shifted, noise))
    assert (a - b).norm() < 1e-3 < (a - c).norm()
