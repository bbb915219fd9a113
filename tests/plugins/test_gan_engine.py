"""The adversarial objective in the engine: orders, starts, balance, frozen encoders, resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, weights
from torch import Tensor

from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_gan.losses import critic_loss

SGD = {
    "use": "sgd",
    "lr": 0.05,
    "betas": [0.0, 0.0],
    "weight_decay": 0.0,
    "warmup": 0,
    "schedule": "constant",
}
SECTIONS: dict[str, Any] = {
    "modality": "image",
    "encoder": {"use": "vit", "patch": 8, "image_size": 32, "width": 16, "depth": 1, "heads": 1},
    "decoder": {"use": "vit_pixels", "width": 16, "depth": 1, "heads": 1},
    "train": {"optim": SGD},
}
PATCH: dict[str, Any] = {"use": "gan", "layers": 2, "channels": 4}
FEATURES: dict[str, Any] = {
    "use": "gan", "discriminator": "features", "backbone": "random", "allow_random_backbone": True,
}  # fmt: skip
RECONSTRUCTION: dict[str, Any] = {"lpips": 0.0, "l2": 1.0}
MODES = [
    {"order": "before"},
    {"order": "after", "input": "reuse"},
    {"order": "after", "input": "fresh"},
]


def engine_with(gan: dict[str, Any], batch: int = 4, **sections: Any) -> Engine:
    gan = {**gan, "critic": {"optim": SGD, **gan.get("critic", {})}}
    return engine_of({"reconstruction": RECONSTRUCTION, "gan": gan}, batch, **{**SECTIONS, **sections})


def pictures(engine: Engine, seed: int) -> Inputs:
    given = batch_of(engine, seed)
    return Inputs({name: view.sigmoid() for name, view in given.views.items()}, given.fields)


def trained(engine: Engine, steps: int, first: int = 0) -> list[dict[str, float]]:
    return [engine.step(pictures(engine, first + step)) for step in range(steps)]


@pytest.mark.parametrize("critic", MODES)
@pytest.mark.parametrize(
    "gan",
    [PATCH, {**PATCH, "norm": "actnorm"}, {**FEATURES, "lecam": 0.1, "diffaug": 0.5}],
)
def test_a_run_goes_on_bit_by_bit_from_any_step(gan: dict[str, Any], critic: dict[str, Any]) -> None:
    slow = {**SGD, "lr": 1e-3}  # what an actnorm scales up soon runs away
    keys = {
        **gan,
        "start": 3,
        "critic": {"start": 1, "optim": slow, **critic},
        "balance": {"against": "reconstruction"},
    }
    engine = engine_with(keys)
    trained(engine, 2)  # the critic has begun, its objective has not
    for step in (2, 4):
        parts = copy.deepcopy(engine.state())
        other = engine_with(keys)
        other.load(parts, step)
        rows = trained(engine, 2, first=step)
        assert rows == trained(other, 2, first=step)
        close(weights(engine), weights(other), 0)
        assert not engine.model.objectives["gan"].pending


@pytest.mark.parametrize("critic", MODES)
def test_running_statistics_count_every_pass_once(critic: dict[str, Any]) -> None:
    engine = engine_with({**PATCH, "start": 2, "critic": {"start": 1, **critic}})
    objective: Any = engine.model.objectives["gan"]
    seen = []
    for step in range(4):
        engine.step(pictures(engine, step))
        seen.append(int(objective.critic.main[3].num_batches_tracked))
    assert seen == [0, 2, 5, 8]  # a critic's turn has two passes, a generator's one


def test_the_critic_and_the_decoder_move_as_a_loop_moves_them() -> None:
    engine = engine_with({**PATCH, "norm": "group", "weight": 0.5, "balance": {"against": "reconstruction"}})
    model: Any = engine.model
    objective, decoder = copy.deepcopy(model.objectives["gan"]), copy.deepcopy(model.decoder)
    objective.critic.requires_grad_(True)
    given = pictures(engine, 0)
    x = model.modality.normalise(given.views["image"][:, 0])
    latent = model.bottleneck(model.encoder(x)["patches"])["carried"]
    decoded = decoder(latent.transpose(1, 2).unflatten(2, (4, 4)))["decoded"]
    signs = [2 * model.modality.to_display(v) - 1 for v in (x, decoded)]
    turn = _turn()
    fooled = -objective.critic(signs[1], turn).mean()
    off = decoded - x
    rec = off.abs().mean() + off.square().mean()
    last = decoder.proj_out.weight
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (rec, fooled)]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    total = rec + weight.detach() * fooled
    logits = [objective.critic(v.detach(), turn) for v in signs]
    critic = critic_loss("hinge", logits[0], True) + critic_loss("hinge", logits[1], False)
    aims = {name: p - 0.05 * g for (name, p), g in _gradients(decoder, total)}
    turns = {name: p - 0.05 * g for (name, p), g in _gradients(objective.critic, critic)}
    row = engine.step(given)
    assert row["weight/gan"] == pytest.approx(float(weight), rel=1e-9)
    close({name: p.detach() for name, p in model.decoder.named_parameters()}, aims)
    close({name: p.detach() for name, p in model.objectives["gan"].critic.named_parameters()}, turns)


def _turn() -> Any:
    from vtp_core.clock import StepClock
    from vtp_gan.layers import Turn

    return Turn(StepClock(), {})


def _gradients(module: Any, loss: Tensor) -> Any:
    named = list(module.named_parameters())
    grads = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True)
    return [((name, p.detach()), g) for (name, p), g in zip(named, grads, strict=True)]


def test_latents_of_a_frozen_encoder_stay_bit_identical() -> None:
    engine = engine_with(
        {**FEATURES, "balance": {"against": "reconstruction"}, "critic": {"input": "fresh"}},
        tokenizer={"frozen": ["encoder", "bottleneck"]},
    )
    model: Any = engine.model
    x = model.modality.normalise(torch.rand(4, 3, 32, 32).double())

    def latents() -> Tensor:
        z: Tensor = model.bottleneck(model.encoder(x)["patches"])["latent"]
        return z.detach().clone()

    before, decoder = latents(), copy.deepcopy(model.decoder.state_dict())
    trained(engine, 3)
    assert torch.equal(latents(), before)
    assert not torch.equal(model.decoder.state_dict()["proj_out.weight"], decoder["proj_out.weight"])


def test_the_decoder_is_read_once_for_both_objectives() -> None:
    engine = engine_with(PATCH)
    assert len([node for node in engine.plan().demands if node.kind == "decode"]) == 1


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_critic_accumulates(norm: str) -> None:
    single = engine_with({**PATCH, "norm": norm})
    halves = engine_with({**PATCH, "norm": norm}, train={"optim": SGD, "accumulate": 2})
    for engine in (single, halves):
        trained(engine, 2)
    close(weights(single), weights(halves), 1e-9)


def test_a_critic_that_couples_rows_of_fresh_input_does_not_accumulate() -> None:
    fresh = {**PATCH, "critic": {"input": "fresh"}}
    with pytest.raises(
        ValueError, match=r"objectives.gan.critic: it couples the rows.*use train.accumulate=1"
    ):
        engine_with(fresh, train={"optim": SGD, "accumulate": 2})
