"""One toy stack for every unusual system that the contract must hold."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, grid, owners, seen_by

from vtp_core.clock import StepClock
from vtp_core.errors import StackFault
from vtp_core.forwards import Inputs

FLOW: dict[str, Any] = {"generator": {"use": "denoiser", "path": {"use": "straight"}}}
TEACHER: dict[str, Any] = {"teachers": {"judge": {}}}


def test_a_module_of_two_objectives_is_one_group_with_one_shadow_saved_once() -> None:
    objectives = {"distil": {"head": "head"}, "masked": {"head": "head"}}
    engine = engine_of(objectives, modules={"head": {"optim": {"lr": 0.5}}})
    head = engine.model.shared["head"]
    assert engine.model.objectives["distil"].head is engine.model.objectives["masked"].head is head
    assert {
        group["owner"] for group in engine.optimizers.optimizers["adamw"].param_groups if group["lr"] == 0.5
    } == {"modules/head"}
    assert [p.shape for p in engine.optimizers.owners["modules/head"]] == [(7, 6), (7,)]
    assert "distil" not in engine.optimizers.owners
    assert engine.model.objectives["distil"].ema("head") is engine.model.objectives["masked"].ema("head")
    assert sum("weight" in key for key in engine.ema.state() if key.startswith("objectives")) == 1
    parts = engine.state()
    assert set(parts["modules/head"]) == {"weight", "bias"}
    assert set(parts["objectives/distil"]) == {"centre"}
    assert not parts["objectives/masked"]


def test_the_gradients_of_two_objectives_add_up_in_a_shared_module() -> None:
    objectives = {"a": {"use": "distil", "head": "head"}, "b": {"use": "distil", "head": "head", "rows": 0.5}}
    engine = engine_of(objectives, modules={"head": {}})
    batch = batch_of(engine)
    one, _ = gradients(engine, batch)
    split = [gradients(engine_of({n: o}, modules={"head": {}}), batch)[0] for n, o in objectives.items()]
    close(
        {"w": one["modules/head.weight"]},
        {"w": split[0]["modules/head.weight"] + split[1]["modules/head.weight"]},
    )


@pytest.mark.parametrize("rows", [1.0, 0.5])
def test_a_balanced_weight_is_the_ratio_of_two_gradients_at_the_anchor(rows: float) -> None:
    balance = {"against": "rebuild", "at": "decoder.last", "eps": 1e-3}
    engine = engine_of(
        {"rebuild": {"weight": 0.7}, "fool": {"weight": 0.4, "balance": balance, "rows": rows, "warmup": 4}}
    )
    batch, keys = batch_of(engine), {"rebuild": {"weight": 0.7}, "fool": {"rows": rows}}
    pulls = {name: gradients(engine_of({name: own}), batch)[0] for name, own in keys.items()}
    norms = {name: torch.linalg.vector_norm(pull["decoder.last.weight"]) for name, pull in pulls.items()}
    weight = 0.4 * 0.25 * float(norms["rebuild"] / (norms["fool"] + 1e-3))
    found, row = gradients(engine, batch)
    assert row["weight/fool"] == pytest.approx(weight, rel=1e-10)
    expected = {key: pulls["rebuild"][key] + weight * pulls["fool"][key] for key in pulls["rebuild"]}
    close({key: found[key] for key in expected}, expected)


def test_a_balanced_weight_has_a_ceiling() -> None:
    balance = {"against": "rebuild", "max": 1e-6}
    engine = engine_of({"rebuild": {}, "fool": {"weight": 0.5, "balance": balance}})
    assert engine.step(batch_of(engine))["weight/fool"] == pytest.approx(0.5e-6)


def test_an_anchor_that_is_not_there_is_an_error() -> None:
    engine = engine_of({"rebuild": {}, "fool": {"balance": {"against": "rebuild", "at": "decoder.lasst"}}})
    with pytest.raises(StackFault, match=r"no anchor 'decoder.lasst'; did you mean 'decoder.last'"):
        engine.step(batch_of(engine))
    frozen: dict[str, Any] = {"decoder": {"use": "unpatch", "frozen": True}}
    engine = engine_of({"rebuild": {}, "fool": {"balance": {"against": "rebuild"}}}, **frozen)
    with pytest.raises(StackFault, match=r"decoder.last is frozen"):
        engine.step(batch_of(engine))
    engine = engine_of({"rebuild": {}, "read": {"balance": {"against": "rebuild"}}})
    with pytest.raises(StackFault, match=r"decoder.last gets no gradient from 'this objective'"):
        engine.step(batch_of(engine))


def test_a_teacher_is_frozen_and_out_of_the_checkpoint() -> None:
    engine = engine_of({"repa": {}}, **FLOW, **TEACHER)
    judge = engine.model.teachers["judge"]
    before = copy.deepcopy(judge.state_dict())
    got = seen_by(engine, "repa")
    batch = batch_of(engine)
    engine.step(batch)
    close(dict(judge.state_dict()), before, 0)
    assert not any(
        "judge" in part or "judge" in key for part, tensors in engine.state().items() for key in tensors
    )
    expected = judge((batch.views["image"][:, 0] + 1) / 2, want=frozenset({"patches"}))["patches"]
    assert torch.equal(got[0]["to"]["patches"][0], expected)
    assert not got[0]["to"]["patches"].requires_grad


def test_frozen_modules_get_no_gradient_and_stay_in_eval_mode() -> None:
    sections: dict[str, Any] = {
        "encoder": {"use": "patches", "jitter": 0.5, "frozen": True},
        "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise", "law": "fixed", "tau": 0.5}],
    }
    engine = engine_of({"rebuild": {}, "read": {"want": "latent"}}, **sections)
    got = seen_by(engine, "rebuild")
    found, row = gradients(engine, batch_of(engine))
    assert owners(found) == {"bottleneck", "decoder"}
    assert not engine.model.encoder.calls[0]["training"]  # no drop-path on frozen features
    assert got[0]["x"]["decoded"].requires_grad
    assert {key for key in row if key.startswith("grad/")} == {"grad/bottleneck", "grad/decoder"}
    assert engine.model.encoder.training  # the mode was for that forward


def test_a_frozen_module_with_a_misspelt_name_is_an_error() -> None:
    with pytest.raises(StackFault, match=r"tokenizer.frozen: no module 'encodr'; did you mean 'encoder'"):
        engine_of({"read": {}}, tokenizer={"frozen": ["encodr"]})


def test_noise_and_a_quantiser_in_one_chain_and_an_objective_on_quantised_tokens() -> None:
    chain = [
        {"use": "linear", "channels": 4},
        {"use": "noise", "law": "fixed", "tau": 0.3},
        {"use": "rounded"},
    ]
    objectives: dict[str, Any] = {
        "rebuild": {},
        "codes": {"use": "read", "want": "latent.quantised", "rows": 0.5},
        "clean": {"use": "read", "want": "latent"},
        "noisy": {"use": "read", "want": "latent.noisy"},
    }
    engine = engine_of(objectives, bottleneck=chain)
    got = {name: seen_by(engine, name) for name in objectives}
    hand, batch = copy.deepcopy(engine.model), batch_of(engine)
    found, _ = gradients(engine, batch)
    linear, noise, _ = hand.bottleneck.links
    clean = linear(hand.encoder(batch.views["image"][:, 0])["patches"])["latent"]
    noisy = noise(clean, StepClock().of("bottleneck/main/image/student/None"))["latent.noisy"]
    quantised = (noisy / 0.5).round() * 0.5
    torch.testing.assert_close(got["clean"][0]["x"]["latent"][0], clean)
    torch.testing.assert_close(got["noisy"][0]["x"]["latent.noisy"][0], noisy)
    torch.testing.assert_close(got["codes"][0]["x"]["latent.quantised"][0], quantised[:4])
    torch.testing.assert_close(got["rebuild"][0]["x"]["decoded"][0], hand.decoder(grid(quantised))["decoded"])
    assert len(engine.model.encoder.calls) == 1
    assert {n.kind: c for n, c in engine.last_runs.items()} == {
        "encode": 1,
        "bottleneck": 1,
        "decode": 1,
        "input": 1,
    }
    assert found["encoder.embed.weight"].abs().sum() > 0  # straight through


def test_an_output_that_the_chain_does_not_give_is_an_error() -> None:
    engine = engine_of({"read": {"want": "latent.quantised"}})
    with pytest.raises(
        StackFault, match=r"bottleneck\(image\) gives no 'latent.quantised'; it gives carried, latent"
    ):
        engine.step(batch_of(engine))


def test_a_waveform_on_the_same_engine() -> None:
    objectives = {
        "rebuild": {}, "masked": {}, "contrast": {}, "drift": {}, "read": {"want": "latent.cls"}
    }  # fmt: skip
    engine = engine_of(
        objectives,
        modality="wave",
        encoder={"use": "patches", "patch": 4, "image_size": 32},
        **FLOW,
    )
    batch = batch_of(engine)
    assert batch.views["global"].shape == (8, 2, 1, 32)
    got = seen_by(engine, "rebuild")
    rows = [engine.step(batch) for _ in range(20)]
    assert got[0]["x"].grid == (8,)
    assert got[0]["x"]["decoded"].shape == (1, 8, 1, 32)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_nothing_touches_torchs_own_generator() -> None:
    engine = engine_of({"drift": {}, "masked": {}, "contrast": {"draws": True}, "fool": {}}, **FLOW)
    batch = batch_of(engine)
    state = torch.get_rng_state()
    engine.step(batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_objective_that_reads_fields_alone_needs_no_stage_of_anybody() -> None:
    engine = engine_of({"rebuild": {}, "read": {"want": "input"}})
    row = engine.step(batch_of(engine))
    assert math.isfinite(row["read/distance"])
    assert isinstance(batch_of(engine), Inputs)
