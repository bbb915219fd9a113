from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, run
from torch import nn

from vtp_core.optim import Optimizers, rate_at
from vtp_core.options import Optim
from vtp_core.teacher import EMATeacher, momentum_at


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    cosine = Optim(lr=2.0, warmup=4, schedule="cosine", final=0.1)
    assert [rate_at(step, 20, cosine) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate_at(4, 20, cosine) == 2.0
    assert rate_at(12, 20, cosine) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate_at(20, 20, cosine) == pytest.approx(0.2)
    assert rate_at(12, 20, Optim(lr=2.0, warmup=4, schedule="linear")) == pytest.approx(1.0)
    assert rate_at(19, 20, Optim(lr=2.0, warmup="20%", schedule="constant")) == 2.0
    assert [rate_at(step, 20, Optim(lr=2.0, warmup=0, freeze=2)) > 0 for step in range(3)] == [
        False,
        False,
        True,
    ]


def test_groups_have_an_owner_and_decay_spares_vectors() -> None:
    engine = engine_of({"rebuild": {}}, encoder={"use": "patches", "optim": {"lr": 0.5, "weight_decay": 0.2}})
    groups: list[dict[str, Any]] = engine.optimizers.optimizers["adamw"].param_groups
    assert {(g["owner"], g["lr"], g["weight_decay"]) for g in groups} == {
        # owner, rate, decay
        ("encoder", 0.5, 0.2), ("encoder", 0.5, 0.0),
        ("bottleneck", 0.01, 0.05), ("decoder", 0.01, 0.05), ("decoder", 0.01, 0.0),
    }  # fmt: skip
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert engine.step(batch_of(engine))["lr/encoder"] == 0.5


def test_components_may_have_another_optimizer() -> None:
    engine = engine_of(
        {"rebuild": {}}, decoder={"use": "unpatch", "optim": {"use": "sgd", "lr": 0.1, "betas": [0.0, 0.0]}}
    )
    before = engine.model.decoder.first.bias.clone()
    caught: list[torch.Tensor] = []
    engine.model.decoder.first.bias.register_post_accumulate_grad_hook(
        lambda p: caught.append(p.grad.clone())
    )
    run(engine, 1)
    torch.testing.assert_close(engine.model.decoder.first.bias, before - 0.1 * caught[0])
    assert set(engine.optimizers.optimizers) == {"adamw", "sgd"}


def test_clipping_scales_all_gradients_together() -> None:
    free, bound = (engine_of({"rebuild": {}}, train={"max_grad_norm": limit}) for limit in (None, 0.01))
    (loose, _), (tight, row) = gradients(free, batch_of(free)), gradients(bound, batch_of(bound))
    norm = math.sqrt(sum(float(g.square().sum()) for g in loose.values()))
    close(tight, {key: grad * 0.01 / (norm + 1e-6) for key, grad in loose.items()})
    whole = math.sqrt(sum(row[key] ** 2 for key in row if key.startswith("grad/")))
    assert whole == pytest.approx(norm)  # the row has the norms as they were


def test_an_optimizer_without_momentum_saves_and_loads() -> None:
    module = nn.Linear(2, 2)
    settings = {"m": Optim(use="sgd", betas=(0.0, 0.0))}
    optimizers = Optimizers({"m": dict(module.named_parameters())}, settings, 10)
    module(torch.ones(1, 2)).sum().backward()
    optimizers.step(0)
    optimizers.load(optimizers.state())


# ---- the EMA teacher


def test_the_teacher_is_the_closed_form_average() -> None:
    engine = engine_of({"distil": {}}, train={"teacher": {"momentum": [0.9, 0.9]}})
    student, teacher = engine.model.encoder, engine.ema.modules["encoder"]
    expected = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    for step in range(10):
        engine.step(batch_of(engine, step))
        for name, parameter in student.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach()
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-12)
        assert not parameter.requires_grad
    assert teacher.training is False


def test_momentum_rises_by_cosine_over_the_run() -> None:
    assert momentum_at(0.0, (0.992, 1.0)) == pytest.approx(0.992)
    assert momentum_at(0.5, (0.992, 1.0)) == pytest.approx(0.996)
    assert momentum_at(1.0, (0.992, 1.0)) == 1.0


def test_a_bfloat16_student_has_a_float32_teacher_that_moves() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    teacher = EMATeacher({"a": module, "b": module})
    copy = teacher.modules["a"]
    assert copy is teacher.modules["b"]
    before = copy.weight.clone()
    with torch.no_grad():
        module.weight += 1
    for _ in range(10):
        teacher.update(0.999)
    torch.testing.assert_close(copy.weight - before, torch.full((2, 2), 1 - 0.999**10), rtol=1e-2, atol=1e-4)
    assert copy.weight.dtype == torch.float32


def test_only_what_somebody_reads_of_the_teacher_is_copied() -> None:
    assert set(engine_of({"distil": {}}).ema.modules) == {"encoder", "objectives/distil/head"}
    assert set(engine_of({"read": {"source": "ema", "want": "indices"}}).ema.modules) == {
        "encoder",
        "bottleneck",
    }
    assert not engine_of({"rebuild": {}}).ema.modules
