from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, grid, run, weights
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs

EVERYTHING: dict[str, Any] = {
    "rebuild": {"weight": {"l2": 0.5, "l1": 2.0}, "rows": 0.5},
    "distil": {"head": "head", "weight": 0.7},
    "masked": {"head": "head", "rows": 0.5},
    "contrast": {"rows": 0.75, "weight": 0.1},
    "read": {"want": "latent.cls", "view": "global", "crops": 2, "mask": "any", "rows": 0.25},
    "drift": {"weight": 0.3},
    "repa": {"weight": 0.2, "through": ["generator"], "cut": [], "rows": 0.5},
}
SECTIONS: dict[str, Any] = {
    "modules": {"head": {}},
    "generator": {"use": "denoiser", "path": {"use": "straight"}, "condition": "label"},
    "teachers": {"judge": {}},
}


def whole(engine: Engine, batch: Inputs, view: str) -> Tensor:
    return batch.views[view].flatten(0, 1)  # (R, K, ...) -> (R*K, ...)


def naive(engine: Engine, batch: Inputs) -> dict[str, Tensor]:
    """The same losses by a full forward per objective and term, summed by hand; gradients by parameter."""
    model, clock = engine.model, StepClock(seed=engine.train_keys.seed)
    e, b, d, g = (copy.deepcopy(m) for m in (model.encoder, model.bottleneck, model.decoder, model.generator))
    objectives, teacher = copy.deepcopy(model.objectives), copy.deepcopy(model.encoder)
    head = objectives["distil"].head  # deepcopied with its owner; iBOT's copy is told apart below
    objectives["masked"].head = head
    old_head = copy.deepcopy(head)
    x, crops = batch.views["image"][:, 0], batch.views["global"]  # (R, ch, h, w), (R, 2, ch, h, w)
    losses = []

    decoded = d(grid(b(e(x[:4])["patches"])["carried"]))["decoded"]
    losses.append(0.5 * (decoded - x[:4]).square().mean() + 2.0 * (decoded - x[:4]).abs().mean())

    mask = engine.layout.samplers["some"](2, 8, (2, 2), clock.of("mask/some"))  # (2, R, N)

    def masked_forward(rows: int) -> dict[str, Tensor]:
        return e(crops[:rows].flatten(0, 1), mask=mask[:, :rows].transpose(0, 1).flatten(0, 1))

    scores = old_head(teacher(crops.flatten(0, 1))["cls"]).softmax(-1).detach()
    losses.append(-0.7 * (scores * head(masked_forward(8)["cls"]).log_softmax(-1)).sum(-1).mean())

    places = mask[:, :4].transpose(0, 1).flatten(0, 1)  # (R*2, N)
    target = old_head(teacher(crops[:4].flatten(0, 1))["patches"][places]).softmax(-1).detach()
    losses.append(-(target * head(masked_forward(4)["patches"][places]).log_softmax(-1)).sum(-1).mean())

    rows = masked_forward(6)["cls"].unflatten(0, (6, 2)).flatten(1)
    table = objectives["contrast"].scale * rows @ rows.T
    losses.append(0.1 * (table.logsumexp(1) - table.diagonal()).mean())

    losses.append((b(masked_forward(2)["cls"][:, None])["latent"] - 0.3).square().mean())

    draws = clock.of("generator/main/image/student/None")
    labels = batch.fields["label"]
    u, noise = draws.uniform("u", 8).double(), draws.normal("noise", 8, 4, 2, 2).double()
    level = u[:, None, None, None]
    z = grid(b(e(x)["patches"])["latent"]).detach()
    guess = g((1 - level) * z + level * noise, u, labels)["prediction"]
    losses.append(0.3 * (guess - (noise - z)).square().mean())

    z = grid(b(e(x[:4])["patches"])["latent"])
    frozen = copy.deepcopy(g).requires_grad_(False)
    hidden = frozen((1 - level[:4]) * z + level[:4] * noise[:4], u[:4], labels[:4])["hidden:1"]
    aim = model.teachers["judge"]((x[:4] + 1) / 2, want=frozenset({"patches"}))["patches"]
    losses.append(0.2 * (objectives["repa"].projector(hidden) - aim).square().mean())

    torch.stack(losses).sum().backward()
    named = {"encoder": e, "bottleneck": b, "decoder": d, "generator": g, "modules/head": head, **objectives}
    found = {
        f"{o}.{n}": p.grad for o, m in named.items() for n, p in m.named_parameters() if p.grad is not None
    }
    found["loss"] = torch.stack(losses).sum().detach()
    return found


def test_a_planned_step_equals_the_naive_step() -> None:
    engine = engine_of(EVERYTHING, **SECTIONS)
    batch = batch_of(engine)
    expected = naive(engine, batch)
    found, row = gradients(engine, batch)
    assert abs(row["loss"] - float(expected.pop("loss"))) < 1e-10
    close(found, expected)
    # 7 objectives and 9 encoder forwards by hand; here: image, global masked, global of the teacher
    assert len(engine.model.encoder.calls) == 2
    assert len(engine.ema.modules["encoder"].calls) == 1
    assert set(engine.last_runs.values()) == {1}


def test_an_objective_reads_a_prefix_of_the_batch_crops_first() -> None:
    engine = engine_of({"read": {"want": "patches", "crops": 3, "rows": 0.5}})
    batch = batch_of(engine)
    seen: list[Any] = []
    engine.model.objectives["read"].register_forward_pre_hook(lambda module, args: seen.append(args[0]["x"]))
    engine.step(batch)
    assert seen[0]["patches"].shape == (3, 4, 4, 6)
    assert seen[0].grid == (2, 2)
    assert batch.views["image"].shape[:2] == (4, 3)  # rows that nobody reads are not asked for


def test_masks_and_masked_features_are_in_one_order() -> None:
    engine = engine_of(
        {"masked": {}, "read": {"want": "patches", "view": "global", "crops": 2, "mask": "some", "rows": 0.5}}
    )
    seen: dict[str, Any] = {}
    for name, objective in engine.model.objectives.items():
        objective.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    engine.step(batch_of(engine))
    patches, places = seen["read"]["x"]["patches"], seen["masked"]["student"]
    mask = places.mask
    assert mask.shape == (2, 8, 4)
    assert torch.equal(seen["read"]["x"].mask, mask[:, :4])
    within = mask.nonzero()[:, 1] < 4
    assert torch.equal(places["patches@some"][within], patches[mask[:, :4]])
    assert seen["masked"]["teacher"].mask is not None


def test_a_smaller_reader_of_masked_features_gets_its_rows_alone() -> None:
    engine = engine_of({"a": {"use": "masked"}, "b": {"use": "masked", "rows": 0.25}})
    seen: dict[str, Any] = {}
    for name, objective in engine.model.objectives.items():
        objective.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]["student"]})
        )
    engine.step(batch_of(engine))
    assert torch.equal(seen["b"].mask, seen["a"].mask[:, :2])
    within = seen["a"].mask.nonzero()[:, 1] < 2
    assert torch.equal(seen["b"]["patches@some"], seen["a"]["patches@some"][within])


def test_latents_at_masked_places_go_through_the_bottleneck_alone() -> None:
    engine = engine_of({"read": {"want": "latent@some", "mask": "some", "sampler": "some", "crops": 2}})
    batch = batch_of(engine)
    seen: list[Any] = []
    engine.model.objectives["read"].register_forward_pre_hook(lambda module, args: seen.append(args[0]["x"]))
    model, mask = copy.deepcopy(engine.model), engine.layout.masks(batch, StepClock())["some"]
    engine.step(batch)
    flat = mask.transpose(0, 1).flatten(0, 1)  # (K, R, N) -> (R*K, N)
    latent = model.bottleneck(model.encoder(whole(engine, batch, "image"), mask=flat)["patches"])["latent"]
    latent = latent.unflatten(0, (8, 2)).transpose(0, 1)  # (K, R, N, C)
    torch.testing.assert_close(seen[0]["latent@some"], latent[mask])


def test_the_graph_of_a_stage_is_gone_before_the_next_begins() -> None:
    engine = engine_of(
        {"rebuild": {}, "distil": {}, "drift": {}}, generator=SECTIONS["generator"] | {"condition": None}
    )
    alive: list[int] = []
    held: set[int] = set()

    class Counted:
        """A saved tensor: counted as long as autograd holds it."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # an output that its own node saves would be a cycle
            held.add(id(self))

        def __del__(self) -> None:
            held.discard(id(self))

    for objective in engine.model.objectives.values():
        objective.register_forward_pre_hook(lambda module, args: alive.append(len(held)))
    with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
        engine.step(batch_of(engine))
    assert len(engine.plan().stages) == 3
    gc.collect()
    assert not held
    for name in engine.model.objectives:  # alone, every objective finds the same graph before it
        alone = engine_of({name: {}}, generator=SECTIONS["generator"] | {"condition": None})
        counts: list[int] = []
        alone.model.objectives[name].register_forward_pre_hook(
            lambda module, args, counts=counts: counts.append(len(held))
        )
        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
            alone.step(batch_of(alone))
        assert alive.pop(0) <= counts[0], name


def test_weights_start_stop_skip_and_warm_up() -> None:
    keys = {"start": 2, "stop": 8, "every": 2, "warmup": 4, "weight": 3.0}
    engine = engine_of({"rebuild": {}, "read": keys})
    rows = run(engine, 10)
    assert [row.get("weight/read") for row in rows] == [
        None,
        None,
        0.75,
        None,
        2.25,
        None,
        3.0,
        None,
        None,
        None,
    ]
    for row in rows:
        parts = (
            row["rebuild/l2"]
            + row["rebuild/l1"]
            + row.get("weight/read", 0.0) * row.get("read/distance", 0.0)
        )
        assert row["loss"] == pytest.approx(parts, rel=1e-12)


def test_shares_of_the_run_are_steps() -> None:
    engine = engine_of({"rebuild": {}, "read": {"start": "25%", "stop": "50%"}})
    assert [step for step in range(20) if "read" in engine.active(step)] == [5, 6, 7, 8, 9]


def test_a_step_without_objectives_moves_nothing() -> None:
    engine = engine_of({"read": {"start": 1}})
    before = weights(engine)
    row = engine.step(batch_of(engine))
    assert "loss" not in row
    close(weights(engine), before, 0)


def test_repeats_are_summed_over_different_draws() -> None:
    sections = {"generator": {"use": "denoiser", "path": {"use": "straight"}}}
    once, thrice = engine_of({"drift": {}}, **sections), engine_of({"drift": {"repeat": 3}}, **sections)
    batch = batch_of(once)
    targets: list[Tensor] = []
    thrice.model.objectives["drift"].register_forward_pre_hook(
        lambda m, args: targets.append(args[0]["x"]["target"])
    )
    losses: list[Tensor] = []
    thrice.model.objectives["drift"].register_forward_hook(
        lambda m, args, out: losses.append(out["drift"].detach())
    )
    row = thrice.step(batch)
    assert len({t.sum().item() for t in targets}) == 3
    assert row["drift/drift"] == pytest.approx(float(sum(losses)), rel=1e-12)
    assert once.step(batch)["drift/drift"] == losses[0]  # the first repeat is the draw that everybody shares
    assert len(thrice.model.encoder.calls) == 1


def test_accumulation_equals_the_whole_batch_for_uncoupled_objectives() -> None:
    objectives = {
        "rebuild": {"rows": 0.5}, "drift": {}, "distil": {},
        "read": {"want": "latent.noisy", "repeat": 2},
    }  # fmt: skip
    sections: dict[str, Any] = {
        "generator": {
            "use": "denoiser",
            "path": {"use": "straight"},
            "condition": "label",
            "drop_condition": 0.3,
        },
        "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise", "tau": 0.5}],
        "encoder": {"use": "patches", "jitter": 0.5},
    }
    one, two = (engine_of(objectives, train={"accumulate": a}, **sections) for a in (1, 2))
    (a, row), (b, other) = gradients(one, batch_of(one)), gradients(two, batch_of(two))
    close(a, b, 1e-12)
    assert row == pytest.approx(other, rel=1e-10)


def test_bfloat16_computes_losses_in_float32() -> None:
    engine = engine_of({"rebuild": {}, "distil": {}}, train={"precision": "bfloat16"})
    batch = batch_of(engine)
    batch.views = {name: view.float() for name, view in batch.views.items()}
    row = engine.step(batch)
    assert next(engine.model.encoder.parameters()).dtype == torch.float32
    assert row["loss"] == pytest.approx(row["rebuild/l2"] + row["rebuild/l1"] + row["distil/match"], rel=1e-5)
