"""Generators in every arrangement: beside, behind and inside of the tokenizer."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, grid, owners, run, seen_by, weights
from torch import Tensor

from vtp_core.clock import StepClock

FLOW: dict[str, Any] = {"generator": {"use": "denoiser", "path": {"use": "straight"}}}
TEACHER: dict[str, Any] = {"teachers": {"judge": {}}}


def test_gradient_passes_through_a_module_and_stays_out_of_its_parameters() -> None:
    engine = engine_of({"repa": {"through": ["generator"], "cut": []}}, **FLOW, **TEACHER)
    model = copy.deepcopy(engine.model)
    batch = batch_of(engine)
    found, _ = gradients(engine, batch)
    assert owners(found) == {"encoder", "bottleneck", "repa"}
    # with the generator's parameters taking part, the tokenizer's gradient is the very same
    open_, _ = gradients(engine_of({"repa": {"cut": []}}, **FLOW, **TEACHER), batch)
    assert owners(open_) == {"encoder", "bottleneck", "repa", "generator"}
    close(found, {key: grad for key, grad in open_.items() if not key.startswith("generator")})
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.generator.parameters(), engine.model.generator.parameters(), strict=True)
    )


def test_repa_e_trains_tokenizer_and_generator_apart_in_one_step() -> None:
    """Flow with the latent cut, alignment for either side, and one noise."""
    sections: dict[str, Any] = {**FLOW, **TEACHER, "modules": {"projector": {"use": "head", "prototypes": 5}}}
    objectives: dict[str, Any] = {
        "rebuild": {},
        "drift": {},
        "align_generator": {"use": "repa", "weight": 0.5, "projector": "projector"},
        "align_tokenizer": {
            "use": "repa", "weight": 1.5, "projector": "projector",
            "through": ["generator"], "cut": [], "mode": "eval",
        },
    }  # fmt: skip
    engine = engine_of(objectives, **sections)
    batch = batch_of(engine)
    noised: list[Tensor] = []
    for name in ("align_generator", "align_tokenizer"):
        seen_by(engine, name)
    engine.model.generator.register_forward_pre_hook(lambda module, args: noised.append(args[0].detach()))
    found, _ = gradients(engine, batch)
    assert len(noised) == 2
    assert torch.equal(*noised)  # the same latent, level and noise in both stages
    assert engine.model.generator.calls == [{"hidden:1"}, {"hidden:1", "prediction"}]  # the first exits early
    assert len(engine.model.encoder.calls) == 1

    def alone(names: list[str]) -> dict[str, Tensor]:
        part = engine_of({name: objectives[name] for name in names}, **sections)
        return gradients(part, batch)[0]

    tokenizer, generator = alone(["rebuild", "align_tokenizer"]), alone(["drift", "align_generator"])
    assert owners(generator) == {"generator", "modules/projector", "align_generator"}
    for key, grad in found.items():
        if key.startswith(("encoder", "bottleneck", "decoder")):
            torch.testing.assert_close(grad, tokenizer[key])
        if key.startswith("generator"):
            torch.testing.assert_close(grad, generator[key])


def test_the_encoder_is_also_the_generator() -> None:
    """UNITE: the encoder's blocks denoise too and get gradient from both passes; the flow repeats K times."""
    sections: dict[str, Any] = {
        "generator": {"use": "denoiser", "share": "encoder", "path": {"use": "straight"}}
    }
    engine = engine_of({"rebuild": {}, "drift": {"repeat": 3}}, **sections)
    assert engine.model.generator.network is engine.model.encoder
    assert not any("network" in key for key in engine.state()["generator"])
    assert set(engine.layout.owners()["generator"]) == {
        "enter.weight", "enter.bias", "hidden.weight", "hidden.bias", "leave.weight", "leave.bias",
        "labels.weight",
    }  # fmt: skip
    hand, batch = copy.deepcopy(engine.model), batch_of(engine)
    found, row = gradients(engine, batch)
    assert len(engine.model.encoder.calls) == 1

    x = batch.views["image"][:, 0]
    z = grid(hand.bottleneck(hand.encoder(x)["patches"])["latent"])
    decoded = hand.decoder(z)["decoded"]
    loss = (decoded - x).square().mean() + (decoded - x).abs().mean()
    for turn in ("main", "main#1", "main#2"):
        clock = StepClock().of(f"generator/{turn}/image/student/None")
        u, noise = clock.uniform("u", 8).double(), clock.normal("noise", 8, 4, 2, 2).double()
        level = u.view(-1, 1, 1, 1)
        guess = hand.generator((1 - level) * z.detach() + level * noise, u, None)["prediction"]
        loss = loss + (guess - (noise - z.detach())).square().mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-10)
    close(
        {key: grad for key, grad in found.items() if key.startswith("encoder")},
        {f"encoder.{n}": p.grad for n, p in hand.encoder.named_parameters() if p.grad is not None},
    )
    fresh = engine_of({"rebuild": {}, "drift": {"repeat": 3}}, train={"seed": 1}, **sections)
    fresh.load({part: {k: v.clone() for k, v in t.items()} for part, t in engine.state().items()}, 1)
    close(weights(fresh), weights(engine), 0)


def test_latents_from_the_loader_run_no_encoder() -> None:
    engine = engine_of(
        {"drift": {}, "rebuild": {"rows": 0.5}},
        provided=frozenset({"latent"}),
        tokenizer={"frozen": ["encoder", "bottleneck"]},
        **FLOW,
    )
    assert engine.layout.rows_by_view() == {"latent": 8, "image": 4}
    engine.model.statistics = {"mean": torch.arange(4.0), "std": torch.full((4,), 2.0)}
    got, batch = seen_by(engine, "drift"), batch_of(engine)
    row = engine.step(batch)
    assert not engine.model.encoder.calls
    clock = StepClock().of("generator/main/latent/student/None")
    z = (
        batch.fields["latent"].double() - torch.arange(4.0).view(1, 4, 1, 1)
    ) / 2  # standardised by the engine
    noise = clock.normal("noise", 8, 4, 2, 2).double()
    torch.testing.assert_close(got[0]["x"]["target"][0], noise - z)
    assert math.isfinite(row["rebuild/l2"])
    assert {key for key in row if key.startswith("grad/")} == {"grad/decoder", "grad/generator"}


def test_supplied_latents_can_be_read_as_they_are() -> None:
    engine = engine_of({"read": {"want": "latent"}}, provided=frozenset({"latent"}))
    got, batch = seen_by(engine, "read"), batch_of(engine)
    engine.step(batch)
    z = batch.fields["latent"].double()
    assert torch.equal(
        got[0]["x"]["latent"], z.flatten(2).transpose(1, 2)[None]
    )  # (R, C, h, w) -> (1, R, N, C)
    assert got[0]["x"].grid == (2, 2)


def test_an_autoregressive_generator_has_no_path() -> None:
    engine = engine_of(
        {"drift": {}, "rebuild": {}}, generator={"use": "denoiser", "path": None, "condition": "label"}
    )
    got, batch = seen_by(engine, "drift"), batch_of(engine)
    levels: list[Any] = []
    engine.model.generator.register_forward_pre_hook(lambda module, args: levels.append(args[1]))
    engine.step(batch)
    assert levels == [None]
    x = got[0]["x"]
    assert x["target"].shape == x["prediction"].shape == (1, 8, 4, 2, 2)


def test_labels_are_dropped_in_training_and_never_in_eval_mode() -> None:
    sections: dict[str, Any] = {
        "generator": {**FLOW["generator"], "condition": "label", "drop_condition": 0.5}, **TEACHER
    }  # fmt: skip
    engine = engine_of(
        {"drift": {}, "repa": {"through": ["generator"], "cut": [], "mode": "eval"}}, **sections
    )
    labels: list[Tensor] = []
    engine.model.generator.register_forward_pre_hook(lambda module, args: labels.append(args[2]))
    batch = batch_of(engine)
    engine.step(batch)
    plain, dropped = labels if engine.plan().stages[0].readers == ("repa",) else labels[::-1]
    assert torch.equal(plain, batch.fields["label"])
    assert set(dropped[dropped != plain].tolist()) == {3}  # the null class comes after the classes
    assert 0 < (dropped == 3).sum() < 8


def test_needs_with_one_draw_name_share_noise_whatever_their_rows() -> None:
    objectives: dict[str, Any] = {
        "drift": {}, "few": {"use": "drift", "rows": 0.25, "cut": []},
        "other": {"use": "drift", "draw": "second"},
    }  # fmt: skip
    engine = engine_of(objectives, **FLOW)
    got = {name: seen_by(engine, name) for name in objectives}
    engine.step(batch_of(engine))
    many, few, other = (got[name][0]["x"]["target"] for name in objectives)
    assert torch.equal(many[:, :2], few)
    assert not torch.equal(many, other)


def test_every_step_draws_anew_and_the_seed_decides() -> None:
    targets = []
    for seed in (0, 0, 1):
        engine = engine_of({"drift": {}}, train={"seed": seed}, **FLOW)
        got = seen_by(engine, "drift")
        run(engine, 2)
        targets.append([x["x"]["target"] for x in got])
    assert torch.equal(targets[0][1], targets[1][1])
    assert not torch.equal(targets[0][0], targets[0][1])
    assert not torch.equal(targets[0][0], targets[2][0])
