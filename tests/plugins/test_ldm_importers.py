"""Checkpoints of CompVis's and diffusers' layouts, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core.build import blueprint, tokenizer_only
from vtp_core.converting.conversion import Request, convert
from vtp_core.errors import DataFault
from vtp_core.stack import check_stack
from vtp_core.state import load_tokenizer
from vtp_core.tokenizer import Tokenizer
from vtp_ldm.importers import DIFFUSERS, DIFFUSERS_OLD, LDM, Family, shapes_of
from vtp_plugins.registry import Registry

SHAPE: dict[str, Any] = {"channels": 64, "multipliers": [1, 2], "blocks": 1, "groups": 32}
SECTIONS: dict[str, dict[str, Any]] = {
    "encoder": {
        "use": "ldm_cnn", **SHAPE, "attention": [8], "image_size": 16, "z_channels": 3, "double_z": True,
    },
    "bottleneck": {"use": "kl", "channels": 4, "project": True},
    "decoder": {"use": "ldm_cnn", **SHAPE, "attention": [16, 8], "z_channels": 5, "project": True},
}  # fmt: skip


def weights(sections: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(sections).items()}


@pytest.mark.parametrize("family", [LDM, DIFFUSERS, DIFFUSERS_OLD])
@pytest.mark.parametrize("project", [True, False])
def test_maps_are_exact_both_ways(family: Family, project: bool) -> None:
    sections = {name: dict(node) for name, node in SECTIONS.items()}
    if not project:
        sections["bottleneck"] |= {"project": False, "channels": 3}
        sections["decoder"] |= {"project": False, "z_channels": 3}
    ours = weights(sections)
    theirs = family.to_theirs(ours, sections)
    assert len(theirs) == len(ours)
    found, back = family.to_ours(theirs, image_size=16)
    assert {name: dict(sorted(node.items())) for name, node in found.items()} == {
        name: dict(sorted(node.items())) for name, node in sections.items()
    }
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    again = family.to_theirs(back, found)
    assert again.keys() == theirs.keys() and all(torch.equal(again[name], theirs[name]) for name in theirs)


def test_every_layout_is_refused_by_the_others() -> None:
    families = {"ldm": LDM, "diffusers": DIFFUSERS, "old": DIFFUSERS_OLD}
    for name, family in families.items():
        theirs = family.to_theirs(weights(SECTIONS), SECTIONS)
        for other, reader in families.items():
            if other != name:
                with pytest.raises(ValueError, match=r"tensors|multiples"):
                    reader.to_ours(theirs, image_size=16)


def test_what_is_missing_unknown_or_misshapen_is_named() -> None:
    theirs = LDM.to_theirs(weights(SECTIONS), SECTIONS)
    bias = theirs.pop("decoder.norm_out.bias")
    with pytest.raises(ValueError, match=r"missing: decoder\.norm_out\.bias"):
        LDM.to_ours(theirs, image_size=16)
    with pytest.raises(ValueError, match=r"of another shape: decoder\.norm_out\.bias \(63,\)"):
        LDM.to_ours({**theirs, "decoder.norm_out.bias": bias[:-1]}, image_size=16)
    with pytest.raises(ValueError, match="unknown: quantize"):
        LDM.to_ours({**theirs, "decoder.norm_out.bias": bias, "quantize.weight": bias}, image_size=16)
    ours = weights(SECTIONS)
    with pytest.raises(ValueError, match=r"unknown: generator\.x"):
        LDM.to_theirs({**ours, "generator.x": bias}, SECTIONS)
    ours.pop("encoder.conv_in.bias")
    with pytest.raises(ValueError, match=r"missing: encoder\.conv_in\.bias"):
        LDM.to_theirs(ours, SECTIONS)


def test_tensors_of_the_loss_are_others() -> None:
    theirs = LDM.to_theirs(weights(SECTIONS), SECTIONS)
    beside = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(8, 4, 1, 1)}
    found, _ = LDM.to_ours({**theirs, **beside}, image_size=16)
    assert found["bottleneck"] == SECTIONS["bottleneck"]
    assert LDM.others({**theirs, **beside}).keys() == beside.keys()
    assert not DIFFUSERS.others(beside)


def test_published_shapes_are_read_off_names() -> None:
    shape = {"channels": 128, "multipliers": [1, 1, 2, 2, 4], "blocks": 2, "groups": 32}
    sections = {
        "encoder": {
            "use": "ldm_cnn", **shape, "attention": [16], "image_size": 256, "z_channels": 32, "double_z": True,
        },
        "bottleneck": {"use": "kl", "channels": 32, "project": True},
        "decoder": {"use": "ldm_cnn", **shape, "attention": [16], "z_channels": 32, "project": True},
    }  # fmt: skip
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(sections).items()}
    theirs = LDM.to_theirs(empty, sections)
    assert "encoder.down.4.attn.1.k.weight" in theirs and "decoder.up.4.attn.2.norm.bias" in theirs
    assert LDM.to_ours(theirs)[0] == sections
    assert 69e6 < sum(tensor.numel() for tensor in theirs.values()) < 71e6


# ---- files as they are published


def written(folder: Path, what: Any, name: str = "weights.ckpt") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(what, folder / name)
    return folder / name


def test_a_latent_diffusion_checkpoint_gives_its_autoencoder(tmp_path: Path) -> None:
    theirs, told = LDM.to_theirs(weights(SECTIONS), SECTIONS), list[str]()
    others = {"model.diffusion_model.out.weight": torch.ones(2), "model_ema.decay": torch.ones(())}
    for wrapper in ("", "module."):
        state = {f"{wrapper}first_stage_model.{name}": tensor for name, tensor in theirs.items()}
        state |= {f"{wrapper}{name}": tensor for name, tensor in others.items()}
        state[f"{wrapper}first_stage_model.loss.logvar"] = torch.zeros(())
        file = written(tmp_path / "in", {"state_dict": state, "global_step": 7})
        out = convert(
            Request("ldm", file, words=("image_size=16",), scale=0.18215), tmp_path / f"out{wrapper}", None,
            told.append,
        )  # fmt: skip
        assert torch.equal(
            Tokenizer.from_pretrained(out).encoder.conv_in.weight, theirs["encoder.conv_in.weight"]
        )
        assert told.pop() == (
            "left out, as they belong to others: loss.logvar, model.diffusion_model.out.weight, model_ema.decay"
        )


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, 0.0, 1 / 0.18215),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1 / 1.5305),  # SD3
        (
            {"scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": None},
            0.1159,
            1 / 0.3611,
        ),  # FLUX
        ({"scaling_factor": 0.5, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 6.0),
    ],
)
def test_factors_of_diffusers_become_the_statistics(
    tmp_path: Path, config: dict[str, Any], mean: float, std: float
) -> None:
    state = DIFFUSERS.to_theirs(weights(SECTIONS), SECTIONS)
    file = written(tmp_path / "vae", state, "diffusion_pytorch_model.bin")
    full = {"_class_name": "AutoencoderKL", "sample_size": 1024, "norm_num_groups": 32, **config}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(full))
    out = convert(Request("diffusers_vae", file, words=("image_size=16",)), tmp_path / "out")
    tokenizer, images = Tokenizer.from_pretrained(out), torch.rand(1, 3, 16, 16)
    seen = tokenizer.encode(images, standardized=True)
    torch.testing.assert_close(seen, (tokenizer.encode(images) - mean) / std)
    torch.testing.assert_close(
        tokenizer.decode(seen, standardized=True),
        tokenizer.decode(tokenizer.encode(images)),
        rtol=1e-3,
        atol=1e-3,
    )


def test_factors_that_make_no_latent_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "vae", DIFFUSERS.to_theirs(weights(SECTIONS), SECTIONS))
    for words, match in (
        (("scaling_factor=0",), "scaling_factor: a positive factor"),
        (("scaling_factor=1", "latents_mean=[1.0]"), "latents_mean: 1 values for 4 channels"),
        (("shift_factor=1.0", "latents_std=[1.0,1.0,1.0,1.0]"), "latents_mean: it takes the place"),
        (("latents_std=[1.0,0.0,1.0,1.0]",), "latents_std: every deviation"),
    ):
        with pytest.raises(DataFault, match=match):
            convert(Request("diffusers_vae", file, words=("image_size=16", *words)), tmp_path / "no")
    (tmp_path / "vae" / "config.json").write_text(
        '{"_class_name": "UNet2DConditionModel", "scaling_factor": 0}'
    )
    out = convert(Request("diffusers_vae", file, words=("image_size=16",)), tmp_path / "out")
    assert not Tokenizer.from_pretrained(out).statistics


@pytest.mark.parametrize(
    "kinds", [("DownEncoderBlock2D", "UpDecoderBlock2D"), ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")]
)
def test_diffusers_autoencoder_computes_the_same(kinds: tuple[str, str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", kinds[0]), up_block_types=(kinds[1], "UpDecoderBlock2D"),
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, norm_num_groups=32, sample_size=16,
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = theirs.state_dict()
    sections, tensors = DIFFUSERS.to_ours(state, image_size=16)
    assert sections["encoder"]["attention"] == ([8] if kinds[0].startswith("Attn") else [])
    back = DIFFUSERS.to_theirs(tensors, sections)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    model = tokenizer_only(blueprint(check_stack("vae", {"modality": "image", **sections}, Registry())))
    load_tokenizer(model, tensors)
    tok, images = Tokenizer(model).eval().requires_grad_(False), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        posterior = theirs.encode(2 * images - 1).latent_dist
        z = tok.encode(images)
        torch.testing.assert_close(z, posterior.mean, rtol=1e-4, atol=1e-5)
        decoded = theirs.decode(posterior.mean).sample
    torch.testing.assert_close(2 * tok.decode(z) - 1, decoded, rtol=1e-4, atol=1e-4)
    found = tok.bottleneck(tok.encoder(tok.modality.normalise(images))["patches"])["posterior"][1]
    torch.testing.assert_close(
        found.transpose(1, 2).unflatten(2, (8, 8)), posterior.logvar, rtol=1e-4, atol=1e-5
    )
