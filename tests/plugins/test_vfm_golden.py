"""Parity with bytetriper/RAE: encoder, noise, statistics, decoder and its gradients; weights both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.modalities import Image
from vtp_core.models.bottlenecks import Noise
from vtp_plugins import Spec
from vtp_vfm import RAEDecoder, Timm
from vtp_vfm.importers import RAE
from vtp_vfm.statistics import moments

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden")) / "rae"
LIMIT = 1e-5
Off = Callable[[Tensor, Tensor], float]
SIGNAL = Image()


def stored(name: str) -> dict[str, Tensor]:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"rae/{name} does not travel with the repository; set VTP_GOLDEN")
    return load_file(path)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    return stored("decoder.weights") | stored("encoder.weights")


@pytest.fixture(scope="module")
def rae(theirs: dict[str, Tensor]) -> tuple[Timm, RAEDecoder, dict[str, Any], dict[str, Tensor]]:
    sections, tensors = RAE.to_ours(theirs, image_size=64, heads=2, decoder_heads=4)
    nodes = {
        n: {k: v for k, v in s.items() if k not in {"use", "frozen"}}
        for n, s in sections.items()
        if n != "bottleneck"
    }
    encoder = Timm(Spec(size=(0, 0)), **nodes["encoder"])
    decoder = RAEDecoder(Spec(size=(64, 64), patch=(16, 16), width=32, channels=32), **nodes["decoder"])
    for name, module in (("encoder.", encoder), ("decoder.", decoder)):
        module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
    return encoder.eval(), decoder.eval(), sections, tensors


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return stored("rae")


def shaped(patches: Tensor) -> Tensor:
    return patches.transpose(1, 2).unflatten(2, (4, 4))


def test_weights_go_to_ours_and_back_byte_by_byte(theirs: dict[str, Tensor], rae: Any) -> None:
    _, _, sections, tensors = rae
    back = RAE.to_theirs(tensors, sections) | RAE.others(theirs)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    assert set(RAE.others(theirs)) == {"embeddings.mask_token"}


def test_the_encoder_equals_the_reference(rae: Any, io: dict[str, Tensor], off: Off) -> None:
    encoder = rae[0]
    assert encoder.patch == (16, 16) and encoder.size == (64, 64) and encoder.width == 32
    x = SIGNAL.normalise(io["in.image"])
    with torch.no_grad():
        assert off(encoder.prepared(x)[:1], io["out.encoder_input_first"]) < LIMIT
        found = encoder(x)
        everything = encoder.network.forward_features(encoder.prepared(x))
    assert off(everything, io["out.encoder_last_hidden_all_tokens"]) < LIMIT
    assert off(found["cls"], io["out.encoder_last_hidden_all_tokens"][:, 0]) < LIMIT
    assert off(shaped(found["patches"]), io["out.latent"]) < LIMIT


def test_noise_comes_before_the_normalisation(io: dict[str, Tensor], off: Off) -> None:
    class Given(StepClock):
        def normal(self, name: str, *shape: int) -> Tensor:
            return io["in.noise_n"]

        def uniform(self, name: str, *shape: int) -> Tensor:
            return io["in.noise_u"].flatten()

    noise = Noise(Spec(channels=32), law="uniform", tau=0.8).train()
    found = noise(io["out.latent"].flatten(2).transpose(1, 2), Given())
    noisy = shaped(found["latent.noisy"])
    assert off(noisy, io["out.latent_noised"]) < LIMIT
    std = (io["in.latent_var"] + 1e-5).sqrt()
    assert off((noisy - io["in.latent_mean"]) / std, io["out.latent_noised_then_normalised"]) < LIMIT


def test_the_noise_has_the_laws_of_the_reference() -> None:
    path = GOLDEN / "noise_law.json"
    if not path.is_file():
        pytest.skip("rae/noise_law.json does not travel with the repository; set VTP_GOLDEN")
    law = json.loads(path.read_text())
    noise = Noise(Spec(channels=64), law="uniform", tau=law["tau"]).train()
    levels = noise(torch.zeros(4000, 16, 64), StepClock(0))["latent.noisy"].flatten(1).std(1)
    assert abs(float(levels.mean()) - law["per_sample_std_mean"]) < 0.01
    quantiles = torch.quantile(levels, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert float((quantiles - torch.tensor(law["quantiles_5_25_50_75_95"])).abs().max()) < 0.02


def test_the_decoder_equals_the_reference(rae: Any, io: dict[str, Tensor], off: Off) -> None:
    decoder = rae[1]
    want = frozenset({"decoded", "decoder.hidden:1", "decoder.hidden:2"})
    with torch.no_grad():
        found = decoder(io["out.latent"], want=want)
        embedded = decoder.embedded(io["out.latent"])
        other = decoder(io["in.tokens_other_count"].transpose(1, 2).unflatten(2, (6, 6)))["decoded"]
    assert off(embedded, io["out.decoder.hidden0"]) < LIMIT
    for level in (1, 2):
        assert off(found[f"decoder.hidden:{level}"], io[f"out.decoder.hidden{level}"][:, 1:]) < LIMIT
    decoded = SIGNAL.to_display(found["decoded"])
    assert off(found["decoded"][:1], io["out.decoder.unpatchified_first"]) < LIMIT
    assert off(decoded, io["out.decoded"]) < LIMIT
    logits = io["out.decoder.logits_other_count"].unflatten(1, (4, 4)).unflatten(3, (12, 12, 3))
    assert off(other, logits.permute(0, 5, 1, 3, 2, 4).reshape(1, 3, 48, 48)) < LIMIT
    small = F.interpolate(io["in.image"], size=(48, 48), mode="bilinear", align_corners=False)
    assert off((decoded - small).abs().mean(), io["out.l1"]) < LIMIT


def test_gradients_of_the_decoder_equal_the_references(rae: Any, io: dict[str, Tensor], off: Off) -> None:
    _, decoder, sections, tensors = rae
    z = io["in.latent_rand"].clone().requires_grad_()
    raw = z * (io["in.latent_var"] + 1e-5).sqrt() + io["in.latent_mean"]
    decoded = SIGNAL.to_display(decoder(raw)["decoded"])
    assert off(decoded, io["out.decoded_latent_rand"]) < LIMIT
    (decoded * io["in.cotangent"]).sum().backward()
    assert off(z.grad, io["grad.latent_rand"]) < LIMIT  # type: ignore[arg-type]
    ours = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ours |= {f"decoder.{name}": p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    theirs = RAE.to_theirs(ours, sections)
    for name, value in io.items():
        kind, _, parameter = name.partition(".")
        if kind == "grad" and parameter != "latent_rand":
            assert off(theirs[parameter], value) < LIMIT, name
        if kind == "gradnorm":
            assert off(theirs[parameter].double().norm(), value) < LIMIT, name
    decoder.zero_grad()


def test_running_moments_equal_the_references(io: dict[str, Tensor], off: Off) -> None:
    found = moments(io["in.stat_batches"])
    assert off(found["mean"], io["out.stat.running_mean"]) < LIMIT
    assert off(found["var"], io["out.stat.running_var"]) < LIMIT
