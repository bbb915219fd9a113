"""The order of updates, held against loops written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, run, weights
from torch import Tensor, nn

from vtp_core.engine import Engine
from vtp_core.errors import StackFault

RATE = 0.05
SGD = {
    "use": "sgd",
    "lr": RATE,
    "betas": [0.0, 0.0],
    "weight_decay": 0.0,
    "warmup": 0,
    "schedule": "constant",
}
SECTIONS: dict[str, Any] = {
    "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise", "law": "fixed", "tau": 0.5}],
    "train": {"optim": SGD},
}


def engine_with(**critic: Any) -> Engine:
    return engine_of(
        {"rebuild": {"weight": {"l1": 0.0}}, "fool": {"weight": 0.3, "critic": {"optim": SGD, **critic}}},
        **SECTIONS,
    )


class ByHand:
    """The same modules, stepped by a loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.step = engine, 0
        model = engine.model
        self.parts = nn.ModuleList(copy.deepcopy(m) for m in (model.encoder, model.bottleneck, model.decoder))
        self.objective: Any = copy.deepcopy(model.objectives["fool"])
        self.moving = [
            p for p in self.objective.critic.parameters() if p.requires_grad or p.ndim == 2 or p.numel() == 1
        ]

    def decoded(self, x: Tensor, train: bool = True) -> Tensor:
        encoder, bottleneck, decoder = self.parts
        self.parts.train(train)
        clock = self.engine._clock(0).of("bottleneck/main/image/student/None")
        z = bottleneck(encoder(x)["patches"], clock)["carried"]
        out: Tensor = decoder(z.transpose(1, 2).unflatten(2, (2, 2)))["decoded"]
        return out

    def critic_loss(self, x: Tensor, fake: Tensor) -> Tensor:
        real, fake = (self.objective.critic(v.flatten(1)) for v in (x, fake.detach()))
        loss: Tensor = (real - 1).square().mean() + fake.square().mean()
        return loss

    def generator_loss(self, x: Tensor, decoded: Tensor) -> Tensor:
        fooled = self.objective.critic(decoded.flatten(1))
        loss: Tensor = (decoded - x).square().mean() + 0.3 * (fooled - 1).square().mean()
        return loss

    def move(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        for parameter, grad in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if grad is not None:
                parameter.data -= RATE * grad

    def agree(self) -> None:
        model = self.engine.model
        for mine, theirs in zip(self.parts, (model.encoder, model.bottleneck, model.decoder), strict=True):
            close(dict(theirs.state_dict()), dict(mine.state_dict()))
        close(dict(model.objectives["fool"].state_dict()), dict(self.objective.state_dict()))


def test_before_the_critic_moves_and_the_tokenizer_sees_it_moved() -> None:
    engine = engine_with(order="before")
    hand = ByHand(engine)
    for step in range(3):
        batch = batch_of(engine, step)
        x = batch.views["image"][:, 0]
        decoded = hand.decoded(x)
        unfreeze(hand)
        hand.move(hand.critic_loss(x, decoded), hand.moving)
        hand.move(hand.generator_loss(x, decoded), list(hand.parts.parameters()))
        engine.step(batch)
        hand.agree()


def test_after_with_reuse_both_losses_see_everything_from_before_the_step() -> None:
    engine = engine_with(order="after", input="reuse", weight=0.7)
    hand = ByHand(engine)
    for step in range(3):
        batch = batch_of(engine, step)
        x = batch.views["image"][:, 0]
        decoded = hand.decoded(x)
        unfreeze(hand)
        critic = 0.7 * hand.critic_loss(x, decoded)
        generator = hand.generator_loss(x, decoded)
        hand.move(generator, list(hand.parts.parameters()))  # both graphs stand before anything moves
        hand.move(critic, hand.moving)
        engine.step(batch)
        hand.agree()


def test_after_with_fresh_the_critic_sees_the_moved_tokenizer_in_eval_mode() -> None:
    engine = engine_with(order="after", input="fresh")
    hand = ByHand(engine)
    for step in range(3):
        batch = batch_of(engine, step)
        x = batch.views["image"][:, 0]
        unfreeze(hand)
        hand.move(hand.generator_loss(x, hand.decoded(x)), list(hand.parts.parameters()))
        hand.move(hand.critic_loss(x, hand.decoded(x, train=False)), hand.moving)
        row = engine.step(batch)
        hand.agree()
        assert {"fool/critic_real", "fool/critic_fake", "grad/fool/critic"} <= row.keys()
    assert engine.model.encoder.training


def unfreeze(hand: ByHand) -> None:
    for parameter in hand.moving:
        parameter.requires_grad_(True)


def test_a_frozen_part_of_a_critic_stays_frozen() -> None:
    engine = engine_with()
    bias = engine.model.objectives["fool"].critic[0].bias
    before = bias.clone()
    run(engine, 3)
    assert torch.equal(bias, before)


@pytest.mark.parametrize("source", ["reuse", "fresh"])
def test_a_critic_may_start_before_its_objective(source: str) -> None:
    engine = engine_of(
        {"rebuild": {}, "fool": {"start": 4, "critic": {"start": 2, "input": source, "optim": SGD}}},
        **SECTIONS,
    )
    critic = engine.model.objectives["fool"].critic[0].weight
    moved, shown = [], []
    for step in range(6):
        before = critic.clone()
        row = engine.step(batch_of(engine, step))
        moved.append(not torch.equal(critic, before))
        shown.append(("fool/critic_real" in row, "fool/fool" in row))
    assert moved == [False, False, True, True, True, True]
    assert shown == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 2


def test_a_watching_critic_costs_no_graph() -> None:
    engine = engine_of({"fool": {"start": 4, "critic": {"start": 0}}, "read": {}}, **SECTIONS)
    assert {node.kind for node in engine.plan().live} == {"encode"}
    before = weights(engine)
    engine.step(batch_of(engine))
    after = weights(engine)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("tokenizer/decoder"))
    assert not torch.equal(
        before["objectives/fool/critic.0.weight"], after["objectives/fool/critic.0.weight"]
    )


@pytest.mark.parametrize("source", ["reuse", "fresh"])
def test_a_critic_accumulates_like_everything_else(source: str) -> None:
    objectives = {"rebuild": {"weight": {"l1": 0.0}}, "fool": {"critic": {"input": source, "optim": SGD}}}
    engines = [
        engine_of(objectives, **{**SECTIONS, "train": {"optim": SGD, "accumulate": a}}) for a in (1, 2)
    ]
    rows = [run(engine, 2) for engine in engines]
    close(weights(engines[0]), weights(engines[1]), 1e-12)
    assert rows[0][1]["fool/critic_fake"] == pytest.approx(rows[1][1]["fool/critic_fake"], rel=1e-12)


def test_a_critic_that_goes_first_cannot_wait_for_fresh_input() -> None:
    with pytest.raises(StackFault, match="input 'fresh' goes with order 'after'"):
        engine_of({"fool": {"critic": {"order": "before", "input": "fresh"}}})


def test_a_critics_gradient_is_clipped_by_itself() -> None:
    free = engine_of({"fool": {"critic": {"optim": SGD}}}, train={"optim": SGD})
    bound = engine_of({"fool": {"critic": {"optim": SGD}}}, train={"optim": SGD, "max_grad_norm": 1e-3})
    shifts = []
    for engine in (free, bound):
        critic = engine.model.objectives["fool"].critic[0].weight
        before = critic.clone()
        row = engine.step(batch_of(engine))
        shifts.append(torch.linalg.vector_norm(critic - before))
    assert shifts[1] < 1.01e-3 * RATE < shifts[0]
    assert row["grad/fool/critic"] > 1e-3  # the norm is noted as it was
