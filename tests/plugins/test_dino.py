"""DINO against DINOv2's CLS loss, alone and in a whole self-supervised step, and over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.nn.prototypes import PrototypeHead
from vtp_dino import DINO
from vtp_ibot import IBot
from vtp_koleo import KoLeo
from vtp_plugins import Need, Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_losses"
SPEC = Spec(width=32)
CLOCK = StepClock(steps=100)
Off = Callable[[Tensor, Tensor], float]


class Scores(nn.Module):
    """A head whose input already is the scores."""

    prototypes = 64

    def __init__(self, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(64, dtype=kind))

    def features(self, x: Tensor) -> Tensor:
        return x


def outputs(name: str, value: Tensor, mask: Tensor | None = None) -> Outputs:
    return Outputs({name: value}, mask)


def dino(**options: Any) -> DINO:
    sizes = {"prototypes": 40, "hidden": 12, "bottleneck": 6, "local_crops": 3}
    objective = DINO(Spec(width=8), **{**sizes, **options})
    objective.bind_shadows({"head": PrototypeHead(Spec(width=8), prototypes=40, hidden=12, bottleneck=6)})
    return objective


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_the_loss_equals_dinov2s_on_given_scores(centering: Any, off: Off) -> None:
    stored = load_file(GOLDEN / "cls_loss.safetensors")
    objective = DINO(SPEC, head=Scores(), centering=centering, teacher_temperature=(0.05, 0.05))
    objective.bind_shadows({"head": Scores()})
    if centering == "softmax":
        objective.centering.centre.copy_(stored["in.center"][0])
    student = stored["in.student_global_logits"].requires_grad_()
    local = stored["in.student_local_logits"].requires_grad_()
    teacher = stored["in.teacher_logits"].unflatten(0, (2, 4)).flip(0)  # stored in the order after the swap
    got = {
        "student": outputs("cls", student.unflatten(0, (2, 4))),
        "local": outputs("cls", local.unflatten(0, (3, 4))),
        "teacher": outputs("cls", teacher),
    }
    terms = objective(got, CLOCK)
    sum(terms.values()).backward()
    assert off(terms["global"], stored[f"out.{centering}.dino_global_crops_loss"]) < 1e-5
    assert off(terms["local"], stored[f"out.{centering}.dino_local_crops_loss"]) < 1e-5
    assert off(student.grad, stored[f"grad.{centering}.student_global_logits"]) < 1e-5
    assert off(local.grad, stored[f"grad.{centering}.student_local_logits"]) < 1e-5


@pytest.mark.parametrize(("centering", "name"), [("softmax", "centering"), ("sinkhorn", "sinkhorn_knopp")])
def test_two_steps_of_dino_ibot_and_koleo_equal_dinov2s(centering: Any, name: str, off: Off) -> None:
    stored = load_file(GOLDEN / f"meta_arch_{name}.safetensors")
    weights = load_file(GOLDEN / "meta_arch.weights.safetensors")
    heads = {}
    for who in ("student", "teacher"):
        heads[who] = PrototypeHead(SPEC, prototypes=64, hidden=48, bottleneck=24)
        prefix = f"{who}.dino_head."
        heads[who].load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
    head = heads["student"]
    objectives = {
        "dino": DINO(SPEC, head=head, centering=centering),
        "ibot": IBot(SPEC, head=head, centering=centering),
        "koleo": KoLeo(SPEC),
    }
    for objective in objectives.values():
        objective.bind_shadows({"head": heads["teacher"]})
    mask = stored["in.masks"].unflatten(0, (2, 4))
    for step, temperature in enumerate((0.04, 0.045)):
        head.zero_grad()
        leaves = {
            key: stored[f"in.{key}"].clone().requires_grad_()
            for key in ("student_global_cls", "student_global_patch", "student_local_cls")
        }
        cls = leaves["student_global_cls"].unflatten(0, (2, 4))
        patches = leaves["student_global_patch"].unflatten(0, (2, 4))
        aims = stored["in.teacher_patch"].unflatten(0, (2, 4))[mask]
        got = {
            "dino": {
                "student": outputs("cls", cls),
                "local": outputs("cls", leaves["student_local_cls"].unflatten(0, (3, 4))),
                "teacher": outputs("cls", stored["in.teacher_cls"].unflatten(0, (2, 4))),
            },
            "ibot": {
                "student": outputs("patches@block", patches[mask], mask),
                "teacher": outputs("patches@block", aims, mask),
            },
            "koleo": {"student": outputs("cls", cls)},
        }
        terms: dict[str, Tensor] = {}
        for key, objective in objectives.items():
            if key != "koleo":
                objective.centering.temperature = (temperature, temperature)
            terms |= {f"{key}/{term}": value for term, value in objective(got[key], CLOCK).items()}
        terms["koleo/spread"] = 0.1 * terms["koleo/spread"]
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        out = {
            key: stored[f"out.step{step}.{key}"] for key in ("dino_global_crops_loss", "ibot_loss", "total")
        }
        assert off(terms["dino/global"], out["dino_global_crops_loss"]) < 1e-5
        assert off(terms["dino/local"], stored[f"out.step{step}.dino_local_crops_loss"]) < 1e-5
        assert off(terms["ibot/patch"], 2 * out["ibot_loss"]) < 1e-5
        assert off(terms["koleo/spread"], 2 * stored[f"out.step{step}.koleo_loss"]) < 1e-5
        assert off(total, out["total"]) < 1e-5
        for key, leaf in leaves.items():
            assert off(leaf.grad, stored[f"grad.step{step}.{key}"]) < 1e-5, key
        for key, parameter in head.named_parameters():
            if f"grad.step{step}.dino_head.{key}" in stored:
                assert off(parameter.grad, stored[f"grad.step{step}.dino_head.{key}"]) < 1e-5, key
        for objective in objectives.values():
            objective.settle(CLOCK)


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_two_processes_give_the_loss_gradient_and_centre_of_one(
    centering: Any, ranks: Callable[..., list[Any]], off: Off
) -> None:
    objective = dino(centering=centering).double()
    objective.ema("head").double()
    start = {key: value.clone() for key, value in objective.state_dict().items()}
    tokens = {"student": (2, 6, 8), "local": (3, 6, 8), "teacher": (2, 6, 8)}
    whole = {key: torch.randn(shape).double() for key, shape in tokens.items()}

    def share(clock: StepClock) -> tuple[Tensor, dict[str, Tensor]]:
        process = copy.copy(objective)  # the same parameters, but what waits is the process's own
        process.pending = {}
        rows = slice(None) if clock.world == 1 else slice(clock.rank * 3, clock.rank * 3 + 3)
        got = {key: outputs("cls", value[:, rows]) for key, value in whole.items()}
        return torch.stack(list(process(got, clock).values())).sum(), process.pending

    alone, objective.pending = share(CLOCK)
    wanted = torch.autograd.grad(alone, list(objective.parameters()))
    objective.settle(CLOCK)
    settled = {key: value.clone() for key, value in objective.state_dict().items()}
    objective.load_state_dict(start)
    losses, pending = zip(*ranks(2, share), strict=True)
    together = torch.stack(losses).mean()
    assert off(together, alone) < 1e-12
    for ours, one in zip(torch.autograd.grad(together, list(objective.parameters())), wanted, strict=True):
        assert off(ours, one) < 1e-10
    objective.pending = {key: pending[0][key] + pending[1][key] for key in pending[0]}
    objective.settle(CLOCK)
    for key, value in objective.state_dict().items():
        torch.testing.assert_close(value, settled[key])


def test_gradient_reaches_features_and_head_and_not_the_teacher() -> None:
    objective = dino()
    student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    got = {
        "student": outputs("cls", student),
        "local": outputs("cls", student),
        "teacher": outputs("cls", teacher),
    }
    sum(objective(got, CLOCK).values()).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert all(p.grad is not None for p in objective.head.parameters())
    assert teacher.grad is None and all(p.grad is None for p in objective.ema("head").parameters())


def test_without_local_crops_there_is_one_term_and_one_view() -> None:
    objective = dino(local_crops=0)
    x = torch.randn(2, 4, 8)
    terms = objective({"student": outputs("cls", x), "teacher": outputs("cls", x)}, CLOCK)
    assert set(terms) == {"global"} and set(objective.views) == {"global"}


def test_it_brings_views_that_merge_with_ibots_and_koleos() -> None:
    views = [
        DINO(SPEC, **DINO.sizes["tiny"]).views,
        IBot(SPEC, **IBot.sizes["tiny"]).views,
        KoLeo(SPEC).views,
    ]
    assert views[0]["global"] == views[1]["global"] == views[2]["global"]
    assert views[0]["local"].crops == 4
    needs = DINO(SPEC, **DINO.sizes["tiny"]).needs
    assert needs["teacher"] == Need("global", "cls", source="ema", mask=None)


def test_on_latent_cls_reads_the_bottleneck() -> None:
    objective = DINO(Spec(width=8, channels=5), on="latent.cls", **DINO.sizes["tiny"])
    assert objective.head.mlp[0].in_features == 5
    assert objective.needs["local"].want == {"latent.cls"}
