"""Foreign networks as encoders and RAE's decoder: sizes, weights that come later, what is refused, a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import run, write_stack
from torch import Tensor, nn

from vtp_core.modalities import Image
from vtp_core.tokenizer import Tokenizer
from vtp_core.weights_files import pin
from vtp_plugins import Spec
from vtp_plugins.errors import DataFault
from vtp_plugins.importing import Mismatch
from vtp_vfm import RAEDecoder, Timm
from vtp_vfm.decoder import SIZES, positions
from vtp_vfm.importers import RAE
from vtp_vfm.layouts import TOWERS, decoder_names
from vtp_vfm.reading import found_in

NAME = "vit_small_patch14_reg4_dinov2"
ARGUMENTS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 28}
SPEC = Spec(size=(0, 0))
X = torch.randn(2, 3, 32, 48)


def tiny(**options: Any) -> Timm:
    given = {"name": NAME, "weights": "random", "patch": 16, "image_size": 32, "arguments": ARGUMENTS}
    return Timm(SPEC, **{**given, **options}).eval()


# ---- the encoder


def test_pictures_are_resized_so_that_tokens_meet() -> None:
    encoder = tiny()
    assert (encoder.patch, encoder.size, encoder.width, encoder.depth) == ((16, 16), (32, 32), 16, 2)
    assert encoder.prepared(X).shape == (2, 3, 28, 42)
    found = encoder(X, want={"cls": 1, "patches": 2, "hidden:1": 2, "hidden:2": 1})
    assert found["cls"].shape == (2, 16) and found["patches"].shape == (2, 6, 16)
    assert found["hidden:1"].shape == found["hidden:2"].shape == (2, 6, 16)
    assert torch.allclose(encoder(X)["patches"], found["patches"])
    assert set(encoder(X, want={"hidden:1": 2})) == {"hidden:1"}
    assert torch.equal(encoder(X, want={"hidden:1": 2})["hidden:1"], found["hidden:1"])
    assert len(encoder(X, want={"patches": 1})["patches"]) == 1
    assert torch.allclose(tiny(patch=None, image_size=28).prepared(X[..., :28, :28]), X[..., :28, :28])
    with pytest.raises(ValueError, match=r"32 x 32 is not a multiple of 14; .* encoder\.patch"):
        tiny(patch=None)


def test_the_final_norm_is_as_asked() -> None:
    torch.manual_seed(0)
    affine = tiny()
    bare = tiny(affine=False)
    state = {k: v for k, v in affine.state_dict().items() if not k.startswith("network.norm.")}
    bare.load_state_dict(state)
    nn.init.normal_(affine.network.norm.weight)
    nn.init.normal_(affine.network.norm.bias)
    expected = bare(X)["patches"] * affine.network.norm.weight + affine.network.norm.bias
    assert torch.allclose(affine(X)["patches"], expected, atol=1e-6)
    tokens = bare(X)["patches"]
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 6), atol=1e-5)
    assert torch.allclose(tokens.var(-1, unbiased=False), torch.ones(2, 6), atol=1e-2)
    assert {m.eps for m in tiny(eps=1e-3).modules() if isinstance(m, nn.LayerNorm)} == {1e-3}


def test_the_network_reads_its_own_range() -> None:
    image = torch.rand(2, 3, 32, 32)
    x = Image().normalise(image)
    assert torch.equal(tiny(patch=14, image_size=28).range.entered(x), x)
    for name, mean, deviation in (("signed", 0.5, 0.5), ("none", 0.0, 1.0)):
        entered = tiny(normalise=name).range.entered(x)
        assert torch.allclose(entered, (image - mean) / deviation, atol=1e-6)
        assert torch.allclose(tiny(normalise=name).range.left(entered), x, atol=1e-6)


def test_networks_of_other_kinds() -> None:
    siglip = Timm(
        SPEC, name="vit_base_patch16_siglip_256.v2_webli", weights="random", image_size=32, patch=8,
        arguments={"embed_dim": 16, "depth": 1, "num_heads": 2},
    )  # fmt: skip
    assert not hasattr(siglip.network, "attn_pool") or siglip.network.attn_pool is None
    found = siglip(torch.rand(1, 3, 32, 32))
    assert torch.allclose(found["cls"], found["patches"].mean(1))
    cnn = Timm(SPEC, name="resnet10t", weights="random", image_size=64)
    assert cnn.patch == (32, 32) and cnn.depth == 0
    assert cnn.eval()(torch.rand(1, 3, 64, 64))["patches"].shape == (1, 4, cnn.width)
    with pytest.raises(LookupError, match="gives cls and patches"):
        cnn(torch.rand(1, 3, 64, 64), want={"hidden:1": 1})


def test_gradients_reach_every_weight_but_unread_ones() -> None:
    encoder = tiny()
    encoder(X, want={"patches": 2})["patches"].square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_what_it_cannot_do_is_refused() -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match="no mask token"):
        encoder(X, mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="no drop-path"):
        encoder(X, drop=0.1)
    with pytest.raises(
        LookupError, match=r"no output 'hidden:3'; it gives cls, patches and hidden:k, k up to 2"
    ):
        encoder(X, want={"hidden:3": 1})
    with pytest.raises(ValueError, match="timm has no model"):
        tiny(name="vit_smal_patch14_dinov2")
    with pytest.raises(ValueError, match=r"arguments: .* can't be built"):
        tiny(arguments={"colour": "red"})
    with pytest.raises(ValueError, match="affine: resnet10t ends in no layer norm"):
        Timm(SPEC, name="resnet10t", weights="random", affine=False, image_size=64)
    with pytest.raises(ValueError, match="modality 'audio'"):
        Timm(Spec(modality="audio", size=(0,)), name=NAME, weights="random")


# ---- weights


def test_weights_may_come_later_but_must_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    for weights, match in (
        (
            None,
            rf"not at {tmp_path}/timm/{NAME}\.lvd142m\.safetensors(.|\n)*vtp weights import {NAME}\.lvd142m --from",
        ),
        ("checkpoint", "was not loaded"),
    ):
        encoder = tiny(weights=weights)
        with pytest.raises(DataFault, match=match):
            encoder(X)
        twin = copy.deepcopy(encoder)
        nn.ModuleDict({"encoder": encoder}).load_state_dict(
            {f"encoder.{k}": v for k, v in tiny().state_dict().items()}
        )
        encoder(X)
        with pytest.raises(DataFault, match=match):
            twin(X)


def test_a_file_with_timms_keys_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path / "weights"))
    network = tiny().network
    (tmp_path / "timm").mkdir()
    for file, weights in (
        (tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")),
        (tmp_path / "weights" / "timm" / f"{NAME}.lvd142m.safetensors", None),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), file)
        pin(file)
        encoder = tiny(weights=weights, affine=False)
        assert torch.equal(encoder.network.pos_embed, network.pos_embed)
        encoder(X)
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(DataFault, match="holds other weights"):
        tiny(weights=str(tmp_path / "w.safetensors"))


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    spec = Spec(size=(256, 256), patch=(16, 16), channels=768)
    with torch.device("meta"):
        counts = {n: sum(p.numel() for p in RAEDecoder(spec, size=n).parameters()) for n in ("b", "l", "xl")}
    assert {name: round(count / 1e6) for name, count in counts.items()} == {"b": 86, "l": 304, "xl": 415}
    assert set(SIZES) >= {"tiny", "s"}


# ---- the decoder


def test_a_larger_patch_gives_a_larger_picture_and_another_grid_is_resized() -> None:
    spec = Spec(size=(32, 32), patch=(16, 16), channels=6)
    decoder = RAEDecoder(spec, size="tiny", depth=1, patch=32)
    assert decoder(torch.randn(2, 6, 2, 2))["decoded"].shape == (2, 3, 64, 64)
    assert decoder(torch.randn(2, 6, 3, 5))["decoded"].shape == (2, 3, 64, 64)
    found = decoder(torch.randn(1, 6, 2, 2), want=frozenset({"decoder.hidden:1"}))
    assert {k: v.shape for k, v in found.items()} == {"decoder.hidden:1": (1, 4, 192)}
    assert decoder.anchors["last"] is decoder.proj_out.weight
    with pytest.raises(LookupError, match="k up to 1"):
        decoder(torch.randn(1, 6, 2, 2), want=frozenset({"decoder.hidden:2"}))
    with pytest.raises(ValueError, match="the decoder reads"):
        decoder(torch.randn(1, 5, 2, 2))
    with pytest.raises(ValueError, match="multiple of 4 and of heads"):
        RAEDecoder(spec, width=30, heads=3)


def test_positions_are_columns_then_rows() -> None:
    table = positions((2, 3), 8)
    assert table.shape == (6, 8)
    x = torch.tensor([2.0, 2.0 / 100])  # column 2 at frequencies 1 and 1/100
    assert torch.allclose(table[5, :4], torch.cat([x.sin(), x.cos()]))
    y = torch.tensor([1.0, 1.0 / 100])
    assert torch.allclose(table[5, 4:], torch.cat([y.sin(), y.cos()]))


# ---- weights of others


@pytest.mark.parametrize("tower", TOWERS, ids=["dinov2", "mae", "siglip"])
def test_every_tower_goes_to_theirs_and_back(tower: Any) -> None:
    """Names and shapes of theirs are made of a network of ours that timm builds."""
    flat, registers = tower.flat, 4 if tower.registers else 0
    theirs: dict[str, Tensor] = {}
    arguments = {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "img_size": 32,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    }
    more = {"reg_tokens": 4, "no_embed_class": False} if registers else {}
    network = Timm(
        SPEC, name=tower.model(768, registers > 0), weights="random", patch=8, image_size=32, affine=False,
        arguments=arguments | more,
    ).network  # fmt: skip
    for ours, names in tower.names(2, registers).items():
        value = torch.randn_like(network.state_dict()[ours])
        if ours == "pos_embed":
            value = value[0] if flat else torch.cat([value[:, :1], value[:, 1 + registers :]], 1)
        theirs |= {f"vision.{n}": v.clone() for n, v in zip(names, value.chunk(len(names)), strict=True)}
    decoder = RAEDecoder(Spec(size=(32, 32), patch=(8, 8), channels=16), width=16, depth=1, heads=2, patch=4)
    for ours, names in decoder_names(1).items():
        value = torch.randn_like(decoder.state_dict()[ours])
        theirs |= {n: v.clone() for n, v in zip(names, value.chunk(len(names)), strict=True)}
    theirs["decoder_pos_embed"] = torch.cat([torch.zeros(1, 16), positions((4, 4), 16)])[None]
    others = {f"vision.{tower.elsewhere[0]}weight": torch.ones(16), "logit_scale": torch.ones(1)}
    sections, tensors = RAE.to_ours(theirs | others, heads=2, decoder_heads=2)
    assert sections["decoder"]["range"] == ("signed" if tower.signed else "normalised")
    assert RAE.others(theirs | others).keys() == others.keys()
    back = RAE.to_theirs(tensors, sections)
    assert back.keys() == {name.removeprefix("vision.") for name in theirs}
    assert all(torch.equal(back[name.removeprefix("vision.")], tensor) for name, tensor in theirs.items())
    assert found_in(theirs).prefix == "vision."
    with pytest.raises(ValueError, match="heads: width 16 is not published"):
        RAE.to_ours(theirs, decoder_heads=2)
    with pytest.raises(ValueError, match="decoder_heads: width 16"):
        RAE.to_ours(theirs, heads=2)
    with pytest.raises(ValueError, match="not the table of sines"):
        RAE.to_ours(theirs | {"decoder_pos_embed": torch.zeros(1, 17, 16)}, heads=2, decoder_heads=2)
    with pytest.raises(Mismatch, match=r"1 tensor missing: decoder_norm\.bias \(16,\)"):
        RAE.to_ours({k: v for k, v in theirs.items() if k != "decoder_norm.bias"}, heads=2, decoder_heads=2)


# ---- a run

STACK = f"""
modality: image
size: tiny
data: {{use: emoji, batch_size: 8, workers: 0}}
encoder:
  use: timm
  name: {NAME}
  weights: WEIGHTS
  patch: 16
  image_size: 32
  affine: false
  frozen: true
  arguments: {{embed_dim: 16, depth: 2, num_heads: 2, img_size: 28}}
bottleneck: [{{use: noise, law: uniform, tau: 0.8}}]
decoder: {{use: rae, width: 32, depth: 1, heads: 2}}
objectives: {{reconstruction: {{weight: 1.0, lpips: 0.0}}}}
train: {{steps: 2, seed: 0}}
"""


def test_a_decoder_trains_on_a_frozen_encoder_and_loads_without_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    file = tmp_path / "w.safetensors"
    before = tiny().network.state_dict()
    save_file(before, file)
    stack = write_stack(tmp_path, STACK.replace("WEIGHTS", str(file)))
    code, _, said = run(capsys, "train", str(stack), f"run.dir={tmp_path / 'run'}")
    assert code == 0, said
    file.unlink()
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run")
    assert torch.equal(tokenizer.encoder.network.pos_embed, before["pos_embed"])
    image = torch.rand(1, 3, 32, 32)
    assert tokenizer.decode(tokenizer.encode(image)).shape == image.shape
