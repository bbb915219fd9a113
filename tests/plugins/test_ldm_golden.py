"""The autoencoder against values of hustvl/LightningDiT, through the importer and the public surfaces.

Tolerances are those of the READMEs of the golden values. Some cases travel with the repository; ``VTP_GOLDEN`` names a
folder that holds them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.build import blueprint, tokenizer_only
from vtp_core.clock import StepClock
from vtp_core.stack import check_stack
from vtp_core.state import load_tokenizer
from vtp_core.tokenizer import Tokenizer
from vtp_ldm import KL, Gaussian
from vtp_ldm.importers import LDM
from vtp_plugins import Outputs, Spec
from vtp_plugins.registry import Registry

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden"))
CLOCK = StepClock()
Tensors = dict[str, Tensor]
Off = Callable[[Tensor, Tensor], float]


def stored(system: str, name: str) -> Tensors:
    path = GOLDEN / system / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{system}/{name} does not travel with the repository; set VTP_GOLDEN")
    return load_file(path)


def tokenizer(weights: Tensors) -> Tokenizer:
    sections, tensors = LDM.to_ours(weights, image_size=16)
    model = tokenizer_only(blueprint(check_stack("vae", {"modality": "image", **sections}, Registry())))
    load_tokenizer(model, tensors)
    return Tokenizer(model).eval().requires_grad_(False)


def tokens(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)


def grid(z: Tensor) -> Tensor:
    return z.transpose(1, 2).unflatten(2, (8, 8))  # (B, N, C) -> (B, C, 8, 8)


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


class Given:
    """A clock whose only draw is stored."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def normal(self, name: str, *shape: int) -> Tensor:
        assert self.noise.shape == shape
        return self.noise


def test_the_public_pair_on_unit_pictures_is_the_published_one(off: Off) -> None:
    values, weights = stored("repa_vavae", "vavae"), stored("repa_vavae", "vavae.weights")
    tok, images = tokenizer(weights), (stored("repa_vavae", "vavae")["in.image"] + 1) / 2
    z = tok.encode(images)
    assert off(z, values["out.mean"]) < 1e-5
    assert off(2 * tok.decode(z) - 1, values["out.reconstruction_from_mode"]) < 1e-5
    assert off(2 * tok.decode(values["out.z"]) - 1, values["out.reconstruction"]) < 1e-5
    found = tok.bottleneck(tok.encoder(tok.modality.normalise(images))["patches"])
    assert off(found["posterior"][1], tokens(values["out.logvar_clamped"])) < 1e-5


def test_a_draw_is_mean_and_deviation_times_noise(off: Off) -> None:
    values, weights = stored("repa_vavae", "vavae"), stored("repa_vavae", "vavae.weights")
    tok = tokenizer(weights)
    x = tok.encoder(tok.modality.normalise((values["in.image"] + 1) / 2))["patches"]
    found = tok.bottleneck.train()(x, Given(tokens(values["in.posterior_noise"])))
    assert off(found["latent.sample"], tokens(values["out.z"])) < 1e-5
    assert found["carried"] is found["latent.sample"]
    assert off(found["latent"], tokens(values["out.mean"])) < 1e-5
    assert "latent" in tok.bottleneck(x[:, :1, :])  # single tokens pass, without a draw


def test_networks_with_unequal_widths_are_the_published_ones() -> None:
    values, tok = stored("ldm_vae", "vae"), tokenizer(stored("ldm_vae", "weights"))
    taps: Tensors = {}
    for name, module in {
        "conv_in": tok.encoder.conv_in, "down0.downsample": tok.encoder.down[0].downsample,
        "mid.block_1": tok.encoder.mid.block_1, "mid.attn_1": tok.encoder.mid.attn_1,
        "dec.conv_in": tok.decoder.conv_in, "dec.mid.attn_1": tok.decoder.mid.attn_1,
        "dec.up1.upsample": tok.decoder.up[1].upsample,
    }.items():  # fmt: skip
        module.register_forward_hook(keeping(taps, name))
    images = (values["in.image"] + 1) / 2
    encoded = tok.encoder(tok.modality.normalise(images))["patches"]
    found = tok.bottleneck.train()(encoded, Given(tokens(values["in.noise"])))
    mean, log_variance = (grid(part) for part in found["posterior"])
    ours = {
        "encoder": (grid(encoded), 1e-4), "mean": (mean, 1e-4), "logvar": (log_variance, 1e-4),
        "sample": (grid(found["latent.sample"]), 1e-4), "mode": (tok.encode(images), 1e-4),
        "decode_sample": (2 * tok.decode(grid(found["latent.sample"])) - 1, 1e-4),
        "decode_mode": (2 * tok.decode(mean) - 1, 5e-4),
        "decode": (2 * tok.decode(values["in.z"]) - 1, 1e-4),
    }  # fmt: skip
    for name, (value, limit) in ours.items():
        assert far(value, values[f"out.{name}"]) <= limit, name
    limits = {"conv_in": 2e-5, "down0.downsample": 5e-5, "dec.conv_in": 1e-4, "dec.up1.upsample": 5e-4}
    for name, value in taps.items():
        assert far(value, values[f"out.tap.{name}"]) <= limits.get(name, 2e-4), name


def keeping(taps: Tensors, name: str) -> Any:
    """A hook that keeps a module's first output."""

    def hook(module: Any, given: Any, out: Tensor) -> None:
        taps.setdefault(name, out)

    return hook


def divergence(mean: Tensor, log_variance: Tensor, **options: Any) -> Tensor:
    got = {"image": Outputs({"posterior": (mean[None], log_variance[None])})}
    return KL(Spec(), **options)(got, CLOCK)["divergence"]


def test_the_draw_and_its_divergence_in_both_conventions() -> None:
    values = stored("ldm_vae", "vae")
    mean, log_variance = tokens(values["out.mean"]), tokens(values["out.logvar"])
    for row in range(2):
        ours = divergence(mean[row : row + 1], log_variance[row : row + 1])
        assert far(ours, values["out.kl"][row]) <= 1e-3
    link = Gaussian(Spec(width=8), channels=4, project=False).train()
    drawn = link(torch.cat([mean, log_variance], -1), Given(tokens(values["in.noise"])))["latent.sample"]
    assert far(drawn, tokens(values["out.sample"])) <= 1e-4
    bare = divergence(mean, log_variance, reduction="mean", half=False)
    assert far(bare, values["out.kl_no_sum"].mean()) <= 5e-6
    published = stored("repa_vavae", "vavae")
    both = [tokens(published["out.mean"]), tokens(published["out.logvar_clamped"])]
    torch.testing.assert_close(divergence(*both), published["out.kl_per_sample"].mean(), rtol=1e-5, atol=0)


def test_log_variances_outside_the_clamp() -> None:
    values = stored("ldm_vae", "vae")
    moments = values["in.extreme_moments"].flatten(2).transpose(1, 2)  # (B, 8, 2, 2) -> (B, 4, 8)
    mean, log_variance = Gaussian(Spec(width=8), channels=4, project=False)(moments)["posterior"]
    assert far(log_variance.transpose(1, 2).unflatten(2, (2, 2)), values["out.extreme.logvar"]) <= 1e-4
    deviation = (0.5 * log_variance).exp().transpose(1, 2).unflatten(2, (2, 2))
    assert far(deviation, values["out.extreme.std"]) <= 5e-2
    for row in range(2):
        ours = divergence(mean[row : row + 1], log_variance[row : row + 1])
        assert far(ours, values["out.extreme.kl"][row]) <= 1e4


def test_the_conventions_of_audio() -> None:
    jmas, semantic = stored("audio", "jmas"), stored("audio", "svae")
    moments = torch.cat([jmas["in.mean"], jmas["in.scale"]], 1).transpose(1, 2)  # (B, 2 C, T) -> (B, T, 2 C)
    link = Gaussian(Spec(width=12), channels=6, project=False, variance="softplus").train()
    found = link(moments, Given(jmas["in.z_noise"].transpose(1, 2)))
    if "out.vae_sample.z" in jmas:
        assert far(found["latent.sample"].transpose(1, 2), jmas["out.vae_sample.z"]) <= 5e-5
    ours = divergence(*found["posterior"], reduction="token", half=False)
    assert far(ours, jmas["out.vae_sample.kl"]) <= 1e-4
    ours = divergence(semantic["in.mu"], semantic["in.log_var"], reduction="token")
    assert far(ours, semantic["out.kl_of_mu_logvar"]) <= 1e-5
