"""One toy stack for every unusual system that the contract must hold (specs/generators.md 11, specs/tokenizers.md 0)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, run, weights
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.errors import StackFault
from vtp_core.forwards import Inputs
from vtp_plugins.needs import Outputs

FLOW: dict[str, Any] = {"generator": {"use": "denoiser", "path": {"use": "straight"}}}
TEACHER: dict[str, Any] = {"teachers": {"judge": {}}}


def seen_by(engine: Any, name: str) -> list[dict[str, Outputs]]:
    """What the objective is handed, evaluation by evaluation."""
    found: list[dict[str, Outputs]] = []
    engine.model.objectives[name].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return found


def grid(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (2, 2))


def owners(found: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key, grad in found.items() if grad.abs().sum() > 0}


# ---- gradient through a module, and REPA-E


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
    """Flow with the latent cut, alignment for the generator, alignment through it for the tokenizer: one noise."""
    sections: dict[str, Any] = {**FLOW, **TEACHER, "modules": {"projector": {"use": "head", "prototypes": 5}}}
    objectives: dict[str, Any] = {
        "rebuild": {},
        "flow": {},
        "align_generator": {"use": "repa", "weight": 0.5, "projector": "projector"},
        "align_tokenizer": {
            "use": "repa", "weight": 1.5, "projector": "projector", "through": ["generator"], "cut": [], "mode": "eval",
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

    tokenizer, generator = alone(["rebuild", "align_tokenizer"]), alone(["flow", "align_generator"])
    assert owners(generator) == {"generator", "modules/projector", "align_generator"}
    for key, grad in found.items():
        if key.startswith(("encoder", "bottleneck", "decoder")):
            torch.testing.assert_close(grad, tokenizer[key])
        if key.startswith("generator"):
            torch.testing.assert_close(grad, generator[key])


# ---- shared modules


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


def test_the_encoder_is_also_the_generator() -> None:
    """UNITE: the encoder's blocks denoise too and get gradient from both passes; the flow repeats K times."""
    sections: dict[str, Any] = {
        "generator": {"use": "denoiser", "share": "encoder", "path": {"use": "straight"}}
    }
    engine = engine_of({"rebuild": {}, "flow": {"repeat": 3}}, **sections)
    assert engine.model.generator.network is engine.model.encoder
    assert not any("network" in key for key in engine.state()["generator"])
    assert set(engine.layout.owners()["generator"]) == {
        "enter.weight", "enter.bias", "hidden.weight", "hidden.bias", "leave.weight", "leave.bias", "labels.weight"
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
    fresh = engine_of({"rebuild": {}, "flow": {"repeat": 3}}, train={"seed": 1}, **sections)
    fresh.load({part: {k: v.clone() for k, v in t.items()} for part, t in engine.state().items()}, 1)
    close(weights(fresh), weights(engine), 0)


# ---- weights by gradient ratio


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
    engine = engine_of({"rebuild": {}, "read": {"balance": {"against": "rebuild"}}})
    with pytest.raises(StackFault, match="decoder.last gets no gradient from 'this objective'"):
        engine.step(batch_of(engine))


# ---- frozen parts


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
    with pytest.raises(StackFault, match="tokenizer.frozen: no module 'encodr'; did you mean 'encoder'"):
        engine_of({"read": {}}, tokenizer={"frozen": ["encodr"]})


# ---- chains of bottlenecks


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


# ---- supplied latents, autoregressive generators


def test_latents_from_the_loader_run_no_encoder() -> None:
    engine = engine_of(
        {"flow": {}, "rebuild": {"rows": 0.5}},
        provided=frozenset({"latent"}),
        tokenizer={"frozen": ["encoder", "bottleneck"]},
        **FLOW,
    )
    assert engine.layout.rows_by_view() == {"latent": 8, "image": 4}
    engine.model.statistics = {"mean": torch.arange(4.0), "std": torch.full((4,), 2.0)}
    got, batch = seen_by(engine, "flow"), batch_of(engine)
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
        {"flow": {}, "rebuild": {}}, generator={"use": "denoiser", "path": None, "condition": "label"}
    )
    got, batch = seen_by(engine, "flow"), batch_of(engine)
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
        {"flow": {}, "repa": {"through": ["generator"], "cut": [], "mode": "eval"}}, **sections
    )
    labels: list[Tensor] = []
    engine.model.generator.register_forward_pre_hook(lambda module, args: labels.append(args[2]))
    batch = batch_of(engine)
    engine.step(batch)
    plain, dropped = labels if engine.plan().stages[0].readers == ("repa",) else labels[::-1]
    assert torch.equal(plain, batch.fields["label"])
    assert set(dropped[dropped != plain].tolist()) == {3}  # the null class comes after the classes
    assert 0 < (dropped == 3).sum() < 8


# ---- another modality


def test_a_waveform_on_the_same_engine() -> None:
    objectives = {
        "rebuild": {"crops": 2}, "masked": {}, "contrast": {}, "flow": {"view": "wave"}, "latents": {"use": "read", "want": "latent.cls"}
    }  # fmt: skip
    engine = engine_of(
        {**objectives, "rebuild": {}},
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


# ---- draws


def test_needs_with_one_draw_name_share_noise_whatever_their_rows() -> None:
    objectives: dict[str, Any] = {
        "flow": {}, "few": {"use": "flow", "rows": 0.25, "cut": []}, "other": {"use": "flow", "draw": "second"}
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
        engine = engine_of({"flow": {}}, train={"seed": seed}, **FLOW)
        got = seen_by(engine, "flow")
        run(engine, 2)
        targets.append([x["x"]["target"] for x in got])
    assert torch.equal(targets[0][1], targets[1][1])
    assert not torch.equal(targets[0][0], targets[0][1])
    assert not torch.equal(targets[0][0], targets[2][0])


def test_nothing_touches_torchs_own_generator() -> None:
    engine = engine_of({"flow": {}, "masked": {}, "contrast": {"draws": True}, "fool": {}}, **FLOW)
    batch = batch_of(engine)
    state = torch.get_rng_state()
    engine.step(batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_objective_that_reads_fields_alone_needs_no_stage_of_anybody() -> None:
    engine = engine_of({"rebuild": {}, "read": {"want": "input"}})
    row = engine.step(batch_of(engine))
    assert math.isfinite(row["read/distance"])
    assert isinstance(batch_of(engine), Inputs)
