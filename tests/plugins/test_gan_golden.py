"""The critics, their losses and the adaptive weight against taming-transformers and RAE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vtp_core import balance
from vtp_core.clock import StepClock
from vtp_core.nn.backbones import ViT, load, tiny
from vtp_core.options import Balance
from vtp_gan.augment import augmented, blurred, quantised
from vtp_gan.features import FeatureCritic
from vtp_gan.layers import Layer, Norm, Turn
from vtp_gan.losses import critic_loss, generator_loss
from vtp_gan.patch import PatchGAN

GOLDEN = Path(__file__).parents[1] / "golden" / "gan"
CLOCK = StepClock()
Off = Callable[[Tensor, Tensor], float]
CLOSE = 1e-5


def stored_in(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def names_of(pattern: str) -> list[str]:
    """Cases that lie here whole."""
    names = [path.name.partition(".")[0] for path in sorted(GOLDEN.glob(pattern))]
    return [name for name in names if (GOLDEN / f"{name}.safetensors").is_file()]


def settle(critic: nn.Module, pending: dict[str, Tensor]) -> None:
    for layer in critic.modules():
        if isinstance(layer, Layer):
            layer.settle(pending)


def grad_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def patchgan_of(name: str) -> PatchGAN:
    weights = stored_in(f"{name}.weights")
    norm: Norm = "actnorm" if any(key.endswith("loc") for key in weights) else "batch"
    layers = sum(value.ndim == 4 and value.shape[2] == 4 for value in weights.values()) - 2
    width, inputs = weights["main.0.weight"].shape[:2]
    critic = PatchGAN(inputs, (64, 64), width, layers, norm)
    critic.load_state_dict(weights)
    return critic


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    return critic_loss("hinge", real, True) + critic_loss("hinge", fake, False)


def held(critic: nn.Module, stored: dict[str, Tensor], prefix: str, off: Off) -> int:
    """Buffers with stored values, all of them close; how many."""
    state = critic.state_dict()
    found = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    for key, value in found.items():
        assert off(state[key].double(), value.double()) < CLOSE, key
    return len(found)


@pytest.mark.parametrize("name", names_of("patchgan*.weights.safetensors"))
def test_patchgan_equals_tamings_in_every_turn(name: str, off: Off) -> None:
    stored, critic = stored_in(name), patchgan_of(name)
    fake, real = stored["in.fake"].requires_grad_(), stored["in.real"]
    running = Turn(CLOCK, {}, batch=False, learns=False)
    for side, x in (("fake", fake), ("real", real)):
        assert off(critic(x, running), stored[f"out.eval.logits_{side}"]) < CLOSE
    pending: dict[str, Tensor] = {}
    logits = critic(fake, Turn(CLOCK, pending, learns=False))
    loss = generator_loss("hinge", logits, True)
    assert off(logits, stored["out.train.g_logits_fake"]) < CLOSE
    assert off(loss, stored["out.train.g_loss"]) < CLOSE
    assert off(grad_of(loss, fake), stored["grad.train.g.fake"]) < CLOSE
    settle(critic, pending)
    assert held(critic, stored, "after_1_forward.", off)
    pending.clear()
    own = Turn(CLOCK, pending)
    of_real, of_fake = critic(real, own), critic(fake.detach(), own)
    assert off(of_real, stored["out.train.d_logits_real"]) < CLOSE
    assert off(of_fake, stored["out.train.d_logits_fake"]) < CLOSE
    vanilla = critic_loss("vanilla", of_real, True) + critic_loss("vanilla", of_fake, False)
    assert off(vanilla, stored["out.train.d_vanilla"]) < CLOSE
    loss = hinge(of_real, of_fake)
    assert off(loss, stored["out.train.d_hinge"]) < CLOSE
    settle(critic, pending)
    assert held(critic, stored, "after_3_forwards.", off)
    check_gradients(critic, loss, stored, "grad.d.", "gradnorm.d.", off)


def check_gradients(
    critic: nn.Module, loss: Tensor, stored: dict[str, Tensor], whole: str, norms: str, off: Off
) -> None:
    named = dict(critic.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()))
    for name, grad in zip(named, grads, strict=True):
        if f"{whole}{name}" in stored:
            assert off(grad, stored[f"{whole}{name}"]) < CLOSE, name
        if f"{norms}{name}" in stored:
            norm, aim = torch.linalg.vector_norm(grad.double()), stored[f"{norms}{name}"]
            # a bias before a norm has no gradient but what rounding leaves
            assert off(norm, aim) < CLOSE or max(norm, aim) < 1e-7, name


@pytest.mark.parametrize("name", names_of("dinodisc*.backbone.safetensors"))
def test_the_critic_on_frozen_features_equals_raes(name: str, off: Off) -> None:
    stored, weights = stored_in(name), stored_in(f"{name}.backbone")
    depth = sum(key.endswith("qkv.bias") for key in weights)
    heads = {"dinodisc": 2, "dinodisc_gn": 4}[name]
    keys = {"dinodisc": (1, 3), "dinodisc_gn": (2,)}[name]
    network = tiny(img_size=224, patch_size=16, embed_dim=32, depth=depth, num_heads=heads)
    load(network, weights, name)
    frozen = ViT(network, (depth, *keys))
    critic = FeatureCritic(
        frozen, 9 if name == "dinodisc" else 3, "sample" if name == "dinodisc" else "group"
    )
    critic.load_state_dict(stored_in(f"{name}.heads"))
    fake, real = stored["in.fake"].requires_grad_(), stored["in.real"]
    for index, tap in enumerate(frozen(fake)):
        assert off(tap[:1], stored[f"out.activation{index}"]) < CLOSE
    still = Turn(CLOCK, {}, learns=False)
    logits = critic(fake, still)
    loss = generator_loss("hinge", logits, True)
    assert off(logits, stored["out.eval.logits_fake"]) < CLOSE
    assert off(critic(real, still), stored["out.eval.logits_real"]) < CLOSE
    assert off(loss, stored["out.eval.g_loss"]) < CLOSE
    assert off(grad_of(loss, fake), stored["grad.eval.g.fake"]) < CLOSE
    pending: dict[str, Tensor] = {}
    turn = Turn(CLOCK, pending)
    of_fake, of_real = critic(fake.detach(), turn), critic(real, turn)
    assert off(of_fake, stored["out.train.logits_fake"]) < CLOSE
    assert off(of_real, stored["out.train.logits_real"]) < CLOSE
    loss = hinge(of_real, of_fake)
    assert off(loss, stored["out.train.d_hinge"]) < CLOSE
    check_gradients(critic, loss, stored, "grad.train.d.", "gradnorm.train.", off)
    settle(critic, pending)
    assert held(critic, stored, "after_2_train_forwards.", off)


@pytest.mark.parametrize(("kind", "key"), [("hinge", "hinge"), ("vanilla", "vanilla")])
@pytest.mark.parametrize("source", ["", "rae_"])
def test_losses_on_logits_equal_both_references(kind: Any, key: str, source: str, off: Off) -> None:
    stored = stored_in("logit_losses")
    real, fake = (stored[f"in.logits_{side}"].requires_grad_() for side in ("real", "fake"))
    loss = critic_loss(kind, real, True) + critic_loss(kind, fake, False)
    assert off(loss, stored[f"out.d_{source}{key}"]) < CLOSE
    for side, x in (("real", real), ("fake", fake)):
        assert off(grad_of(loss, x), stored[f"grad.d_{source}{key}.{side}"]) < CLOSE
    linear = generator_loss(kind, fake, True)
    assert off(linear, stored["out.g_linear"]) < CLOSE
    assert off(grad_of(linear, fake), stored["grad.g_linear.fake"]) < CLOSE


@pytest.mark.parametrize(("source", "eps", "weight"), [("taming", 1e-4, 0.75), ("rae", 1e-6, 1.0)])
def test_the_adaptive_weight_equals_both_references(source: str, eps: float, weight: float, off: Off) -> None:
    stored = stored_in("adaptive_weight")
    last = nn.Parameter(stored["in.last_layer_weight"])
    decoded = F.conv2d(stored["in.features"], last, padding=1)
    against = (decoded - stored["in.target"]).abs().mean()
    logits = patchgan_of("patchgan")(decoded, Turn(CLOCK, {}, learns=False))
    loss = generator_loss("hinge", logits, True)
    assert off(against, stored[f"out.{source}.rec_loss"]) < CLOSE
    assert off(loss, stored[f"out.{source}.g_loss"]) < CLOSE
    keys = Balance(against="reconstruction", eps=eps)
    ratio = balance.ratio(loss, against, last, keys)
    assert off(weight * ratio, stored[f"out.{source}.weight"]) < CLOSE
    total = against + 0.75 * ratio * loss
    assert off(total, stored[f"out.{source}.total"]) < CLOSE
    assert off(grad_of(total, last), stored[f"grad.{source}.last_layer_of_total"]) < CLOSE
    tiny_loss = -(1e-9 * decoded).mean()
    aim = stored[f"out.tiny_generator_gradient.{source}"]
    assert off(weight * balance.ratio(tiny_loss, against, last, keys), aim) < CLOSE
    if source == "rae":
        clamped = balance.ratio(tiny_loss, against, last, Balance(against="x", eps=eps, max=10))
        assert off(clamped, stored["out.tiny_generator_gradient.rae_clamped_at_10"]) < CLOSE


CASES = {"all": 0.2, "rae": 0.0, "half_a": 0.3, "half_b": 0.3, "nocut": 0.0}


@pytest.mark.parametrize("case", [case for case in CASES if f"out.{case}.image" in stored_in("diffaug")])
def test_diffaug_equals_raes(case: str, off: Off) -> None:
    stored = stored_in("diffaug")
    x, switches = stored["in.image"].requires_grad_(), stored[f"in.{case}.switches"].tolist()
    probability = {"half_a": 0.5, "half_b": 0.5}.get(case, 1.0)
    assert (stored[f"in.{case}.rand3"] <= probability).tolist() == switches
    out = augmented(x, stored[f"in.{case}.rand01"].flatten(1), switches, CASES[case])
    assert off(out, stored[f"out.{case}.image"]) < 1e-6
    assert off(grad_of((out * stored["in.cotangent"]).sum(), x), stored[f"grad.{case}.image"]) < 1e-6


def test_the_fading_blur_and_the_8_bits_equal_raes(off: Off) -> None:
    stored = stored_in("diffaug")
    assert off(blurred(stored["in.image"], 0.3), stored["out.blur_0p3_then_no_aug"]) < 1e-6
    assert off(quantised(1.3 * stored["in.image"]), stored["out.quantised_8bit"]) < 1e-6
    assert torch.equal(blurred(stored["in.image"], 0.0), stored["in.image"])
