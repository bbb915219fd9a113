"""The adversarial objective: its losses, its two turns, what moves and what doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.modalities import Image
from vtp_gan import GAN, signed
from vtp_gan.augment import augmented, quantised
from vtp_gan.features import FeatureCritic
from vtp_gan.layers import ActNorm, Norm, SpectralConv, Turn
from vtp_gan.losses import critic_loss, generator_loss, gradient_penalty, lecam_distance
from vtp_gan.patch import PatchGAN
from vtp_plugins import Outputs, Spec
from vtp_plugins.testing import check_objective

SPEC = Spec(size=(32, 32))
CLOCK = StepClock(steps=10)
PATCH: dict[str, Any] = {"layers": 2, "channels": 4}
FEATURES: dict[str, Any] = {
    "discriminator": "features", "backbone": "random", "allow_random_backbone": True,
}  # fmt: skip
Off = Callable[[Tensor, Tensor], float]


def got_of(rows: int = 4, crops: int = 1, seed: int = 0) -> dict[str, Outputs]:
    torch.manual_seed(seed)
    decoded, aim = (torch.randn(crops, rows, 3, 32, 32) for _ in range(2))
    return {"image": Outputs({"decoded": decoded.requires_grad_(), "input": aim})}


@pytest.mark.parametrize(
    "options",
    [
        PATCH,
        {**PATCH, "statistics": "running", "loss": "lsgan"},
        {**PATCH, "norm": "actnorm", "lecam": 0.1},
        {**PATCH, "norm": "group", "r1": 1.0, "diffaug": 0.7, "cutout": 0.3, "loss": "vanilla"},
        FEATURES,
        {**FEATURES, "norm": "batch", "kernel": 3, "saturates": False},
        {**FEATURES, "norm": "group", "r1": 0.5, "lecam": 0.3, "diffaug": 1.0, "quantise": True},
        {**FEATURES, "blur_until": 0.5},
    ],
)
def test_the_contract_is_kept(options: dict[str, Any]) -> None:
    check_objective(GAN, **options)


# ---- losses


def test_losses_by_hand() -> None:
    logits = torch.tensor([-2.0, 0.5, 3.0])
    assert critic_loss("hinge", logits, True).item() == pytest.approx(0.5 * (3 + 0.5 + 0) / 3)
    assert critic_loss("hinge", logits, False).item() == pytest.approx(0.5 * (0 + 1.5 + 4) / 3)
    assert critic_loss("lsgan", logits, True).item() == pytest.approx(0.5 * (9 + 0.25 + 4) / 3)
    assert critic_loss("lsgan", logits, False).item() == pytest.approx(0.5 * (4 + 0.25 + 9) / 3)
    assert generator_loss("hinge", logits, True).item() == pytest.approx(-0.5)
    assert generator_loss("vanilla", logits, True).item() == pytest.approx(-0.5)
    assert generator_loss("lsgan", logits, True).item() == pytest.approx((9 + 0.25 + 4) / 3)
    for kind in ("hinge", "vanilla", "lsgan"):
        loss = generator_loss(kind, logits, False)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, -torch.log(torch.sigmoid(logits)).mean())


def test_the_gradient_penalty_of_a_linear_critic_is_its_weights_norm() -> None:
    x, weight = torch.randn(3, 2, 4, 4).requires_grad_(), torch.randn(2, 4, 4)
    logits = torch.stack([(x * weight).sum((1, 2, 3)), (3 * x * weight).sum((1, 2, 3))], 1)
    torch.testing.assert_close(gradient_penalty(logits, x), 0.5 * (2 * weight).square().sum())


@pytest.mark.parametrize("options", [{**PATCH, "norm": "group"}, {**PATCH, "norm": "none"}, FEATURES])
def test_the_gradient_penalty_trains_the_critic_as_differences_say(options: dict[str, Any]) -> None:
    objective = GAN(SPEC, r1=2.0, **options).double()
    objective.critic.apply(_larger)
    got = got_of(2)
    got["image"].values = {name: value.detach().double() for name, value in got["image"].values.items()}
    weight = max(objective.critic.parameters(), key=lambda p: p.numel() if p.ndim > 2 else 0)
    penalty = objective.critique(got, CLOCK)["r1"]
    (grad,) = torch.autograd.grad(penalty, weight)
    objective.pending.clear()
    direction, step = F.normalize(grad.flatten(), dim=0).view_as(grad), 1e-6
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        sides.append(objective.critique(got, CLOCK)["r1"])
        objective.pending.clear()
        with torch.no_grad():
            weight -= sign * step * direction
    slope = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(slope, grad.norm(), rtol=1e-3, atol=0.0)


def _larger(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        module.weight.data *= 10
    if isinstance(module, SpectralConv):  # a few iterations on, so that u and v hardly turn any more
        turn = Turn(CLOCK, {})
        for _ in range(300):
            module._directions(turn)
        module.settle(turn.pending)


def test_lecam_ties_each_side_to_the_others_moving_mean(off: Off) -> None:
    objective = GAN(SPEC, lecam=0.5, lecam_decay=0.9, norm="none", **PATCH)
    with torch.no_grad():
        for parameter in objective.critic.parameters():
            parameter.mul_(5)
    means: list[Tensor] = []
    for step in range(3):
        got = got_of(seed=step)
        terms = objective.critique(got, CLOCK)
        still = Turn(CLOCK, {})
        logits = [objective.critic(signed(got["image"][name]), still) for name in ("input", "decoded")]
        if step == 0:
            assert terms["lecam"] == 0
        else:
            weights = torch.tensor([0.9**k for k in reversed(range(len(means)))])
            anchors = (torch.stack(means) * weights[:, None]).sum(0) / weights.sum()
            assert off(terms["lecam"], 0.5 * lecam_distance(*logits, anchors)) < 1e-5
        objective.settle(CLOCK)
        means.append(torch.stack([x.mean() for x in logits]).detach())


# ---- turns


@pytest.mark.parametrize("options", [PATCH, FEATURES])
def test_the_generators_turn_trains_the_picture_and_the_critics_turn_the_critic(options: Any) -> None:
    objective, got = GAN(SPEC, **options), got_of()
    objective.critic.requires_grad_(False)
    objective(got, CLOCK)["fooled"].backward()
    grad = got["image"]["decoded"].grad
    assert grad is not None and grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.parameters())
    objective.critic.requires_grad_(True)
    got["image"]["decoded"].grad = None
    sum(objective.critique(got, CLOCK).values()).backward()  # type: ignore[union-attr]
    assert got["image"]["decoded"].grad is None
    assert all(p.grad is not None for p in objective.critic.parameters())


def test_pictures_reach_the_critic_between_minus_one_and_one() -> None:
    x = torch.rand(2, 3, 3, 4, 4).double()
    torch.testing.assert_close(signed(Image().normalise(x)), 2 * x.flatten(0, 1) - 1)


def test_running_statistics_are_read_on_request_and_move_once_a_pass() -> None:
    objective, got = GAN(SPEC, statistics="running", **PATCH), got_of()
    norm = objective.critic.main[3]
    objective(got, CLOCK)
    assert not objective.pending
    objective.critique(got, CLOCK)
    assert norm.num_batches_tracked == 0
    objective.settle(CLOCK)
    assert norm.num_batches_tracked == 2
    other = GAN(SPEC, **PATCH)
    other(got, CLOCK)
    other.critique(got, CLOCK)
    other.settle(CLOCK)
    assert other.critic.main[3].num_batches_tracked == 3  # taming's generator turn counts too


def test_only_the_critic_sees_8_bits() -> None:
    objective, other = GAN(SPEC, quantise=True, **PATCH), GAN(SPEC, **PATCH)
    other.load_state_dict(objective.state_dict())
    got = got_of()
    assert torch.equal(objective(got, CLOCK)["fooled"], other(got, CLOCK)["fooled"])
    rounded = (quantised(signed(got["image"]["decoded"])) + 1) / 2
    again = {"image": Outputs({**got["image"].values, "decoded": Image().normalise(rounded)[None]})}
    a, b = objective.critique(got, CLOCK)["fake"], other.critique(again, CLOCK)["fake"]
    torch.testing.assert_close(a, b)
    assert not torch.equal(b, other.critique(got, CLOCK)["fake"])


def test_the_first_batch_sets_an_actnorm_and_later_ones_do_not() -> None:
    layer, pending = ActNorm(3), dict[str, Tensor]()
    layer.key = "a"
    x = 3 + 2 * torch.randn(8, 3, 5, 5)
    y = layer(x, Turn(CLOCK, pending))
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    y.sum().backward()
    assert layer.loc.grad is not None and layer.scale.grad is not None
    assert not layer.initialized
    with torch.no_grad():
        layer.loc += 0.25  # an optimizer that goes first
    layer.settle(pending)
    assert layer.initialized
    torch.testing.assert_close(layer(x, Turn(CLOCK, {})), y + 0.25 * layer.scale, atol=1e-5, rtol=1e-5)


def test_a_spectral_convolution_has_norm_one_in_the_end() -> None:
    layer = SpectralConv(6, 5, 1)
    turn = Turn(CLOCK, {})
    for _ in range(200):
        u, v = layer._directions(turn)
    assert torch.equal(layer.weight_u, layer._directions(Turn(CLOCK, {}, learns=False))[0])
    weight = layer.weight_orig.flatten(1)
    torch.testing.assert_close(u @ weight @ v, torch.linalg.matrix_norm(weight, 2))


# ---- the frozen network


def test_a_frozen_network_is_neither_trained_nor_saved_nor_switched() -> None:
    objective = GAN(SPEC, **FEATURES).train()
    assert isinstance(objective.critic, FeatureCritic)
    (backbone,) = objective.critic._frozen
    assert all(key.startswith(("critic.heads", "anchors")) for key in objective.state_dict())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.modules())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    objective.critique(got_of(), CLOCK)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_building_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(GAN(SPEC, **FEATURES).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ---- augmentation


def test_augmentation_meets_the_same_draws_on_any_number_of_processes(
    ranks: Callable[..., list[Any]],
) -> None:
    objective, x = GAN(SPEC, diffaug=0.9, cutout=0.3, **PATCH), torch.randn(2 * 6, 3, 32, 32)
    crops_first = x.unflatten(0, (2, 6))
    whole = objective._seen(x, 2, "fake", StepClock(step=1, steps=10)).unflatten(0, (2, 6))
    parts = ranks(
        2,
        lambda clock: objective._seen(
            crops_first[:, clock.rank :: 2].flatten(0, 1),
            2,
            "fake",
            StepClock(step=1, steps=10, world=2, rank=clock.rank),
        ),
    )
    for rank, part in enumerate(parts):
        assert torch.equal(part.unflatten(0, (2, 3)), whole[:, rank::2])
    assert not torch.equal(whole, crops_first)


def test_augmentation_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    draws = torch.full((7, 1), 0.5)
    assert torch.equal(augmented(x, draws, [True, True, False], 0.0), x)  # one half changes nothing
    draws[0] = 0.99
    down = augmented(x, draws, [True, False, False], 0.0)
    assert torch.equal(down[0, 0, 0], x[0, 0, 0])  # an eighth of four pixels is none
    big = torch.arange(64.0).view(1, 1, 8, 8)
    down = augmented(big, draws, [True, False, False], 0.0)
    assert torch.equal(down[0, 0, :7], big[0, 0, 1:]) and (down[0, 0, 7] == 0).all()
    cut = augmented(torch.ones(1, 1, 8, 8), torch.full((7, 1), 0.5), [False, False, True], 0.5)
    assert (cut[0, 0, 2:6, 2:6] == 0).all() and cut.sum() == 48


def test_the_blur_fades_with_the_run() -> None:
    objective, x = GAN(SPEC, blur_until=0.5, **PATCH), torch.randn(2, 3, 32, 32)
    spread = [
        float(objective._seen(x, 1, "fake", StepClock(step=step, steps=10)).std()) for step in (0, 2, 4, 5)
    ]
    assert spread == sorted(spread) and spread[-1] == pytest.approx(float(x.std()))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r1": 1.0}, "norm: batch mixes"),
        ({"discriminator": "features", "backbone": "random"}, "allow_random_backbone"),
        ({"discriminator": "features", "backbone": "lite"}, "did you mean 'lite0'"),
        ({**FEATURES, "taps": (3,)}, "blocks are 1 to 2"),
        ({**FEATURES, "kernel": 4}, "taps are odd"),
        ({"layers": 4}, "at most 3 do"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GAN(SPEC, **options)


def test_other_modalities_have_no_such_critic() -> None:
    with pytest.raises(ValueError, match="critics look at images"):
        GAN(Spec(modality="audio", size=(100,), patch=(10,)))


def test_the_largest_number_of_layers_works() -> None:
    for side, layers in ((32, 3), (64, 4), (24, 3), (6, 1)):
        norm: Norm = "none"
        critic = PatchGAN(3, (side, side), 2, layers, norm)
        assert critic(torch.randn(1, 3, side, side), Turn(CLOCK, {})).shape[-1] >= 1
        with pytest.raises(ValueError, match=f"at most {layers} do"):
            PatchGAN(3, (side, side), 2, layers + 1, norm)
