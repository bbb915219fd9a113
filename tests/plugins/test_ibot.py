"""iBOT against DINOv2's masked patch loss, and with unequal masks over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.nn.prototypes import PrototypeHead
from vtp_ibot import IBot
from vtp_plugins import Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_losses"
CLOCK = StepClock(steps=100)
Off = Callable[[Tensor, Tensor], float]


class Scores(nn.Module):
    """A head whose input already is the scores."""

    prototypes = 64
    weight = torch.eye(64)

    def features(self, x: Tensor) -> Tensor:
        return x


def ibot(**options: Any) -> IBot:
    sizes = {"prototypes": 40, "hidden": 12, "bottleneck": 6}
    objective = IBot(Spec(width=8), **{**sizes, **options})
    objective.bind_shadows({"head": PrototypeHead(Spec(width=8), **sizes)})
    return objective


def got_of(student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Outputs]:
    """Tokens (K, R, N, D) as the engine deals them."""
    return {
        "student": Outputs({"patches@block": student[mask]}, mask),
        "teacher": Outputs({"patches@block": teacher[mask]}, mask),
    }


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_the_loss_equals_dinov2s_on_given_scores(centering: Any, off: Off) -> None:
    stored = load_file(GOLDEN / "ibot.safetensors")
    objective = IBot(Spec(width=32), head=Scores(), centering=centering, teacher_temperature=(0.05, 0.05))
    objective.bind_shadows({"head": Scores()})
    if centering == "softmax":
        objective.centering.centre.copy_(stored["in.center"].flatten())
    student = stored["in.student_masked_logits"].requires_grad_()
    mask = stored["in.masks"].unflatten(0, (2, 4))
    got = {
        "student": Outputs({"patches@block": student}, mask),
        "teacher": Outputs({"patches@block": stored["in.teacher_masked_logits"]}, mask),
    }
    loss = objective(got, CLOCK)["patch"]
    (gradient,) = torch.autograd.grad(loss, student)
    scale = float(stored[f"out.{centering}.loss_masked"] / stored[f"out.{centering}.ibot_loss_term"])
    assert off(loss, stored[f"out.{centering}.ibot_loss_term"]) < 1e-5 and scale == pytest.approx(1.0)
    assert off(gradient, stored[f"grad.{centering}.student_masked_logits"]) < 1e-5


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_two_processes_with_unequal_masks_give_the_loss_and_gradient_of_one(
    centering: Any, ranks: Callable[..., list[Any]], off: Off
) -> None:
    objective = ibot(centering=centering).double()
    objective.ema("head").double()
    student, teacher = torch.randn(2, 4, 9, 8).double(), torch.randn(2, 4, 9, 8).double()
    mask = torch.rand(2, 4, 9) < 0.4
    mask[:, 2:] &= torch.rand(2, 2, 9) < 0.3
    mask[0, 0] = False

    def share(clock: StepClock) -> Tensor:
        rows = slice(None) if clock.world == 1 else slice(clock.rank * 2, clock.rank * 2 + 2)
        return objective(got_of(student[:, rows], teacher[:, rows], mask[:, rows]), clock)["patch"]

    alone = share(CLOCK)
    wanted = torch.autograd.grad(alone, list(objective.parameters()))
    together = torch.stack(ranks(2, share)).mean()
    assert off(together, alone) < 1e-12
    for ours, one in zip(torch.autograd.grad(together, list(objective.parameters())), wanted, strict=True):
        assert off(ours, one) < 1e-10


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_process_without_masked_patches_takes_part(centering: Any, ranks: Callable[..., list[Any]]) -> None:
    objective = ibot(centering=centering)
    tokens = torch.randn(2, 4, 9, 8, requires_grad=True)
    mask = torch.zeros(2, 4, 9, dtype=torch.bool)
    mask[0, 0, :4] = True

    def share(clock: StepClock) -> Tensor:
        rows = slice(clock.rank * 2, clock.rank * 2 + 2)
        return objective(got_of(tokens[:, rows], tokens.detach()[:, rows], mask[:, rows]), clock)["patch"]

    losses = ranks(2, share)
    assert losses[0] > 0 and losses[1] == 0
    torch.stack(losses).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.head.parameters())


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_a_batch_without_masked_patches_costs_nothing(centering: Any) -> None:
    objective = ibot(centering=centering)
    tokens = torch.randn(2, 3, 9, 8, requires_grad=True)
    loss = objective(got_of(tokens, tokens.detach(), torch.zeros(2, 3, 9, dtype=torch.bool)), CLOCK)["patch"]
    loss.backward()
    objective.settle(CLOCK)
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in objective.head.parameters())
    assert all(b.isfinite().all() for b in objective.buffers())


def test_student_is_masked_and_teacher_is_not() -> None:
    objective = ibot(on="patches")
    assert objective.needs["student"].mask == "block" and objective.needs["teacher"].mask is None
    assert objective.needs["student"].want == objective.needs["teacher"].want == {"patches@block"}
    assert objective.masks["block"].view == "global"


def test_forward_changes_no_state() -> None:
    objective = ibot(centering="softmax")
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    tokens = torch.randn(2, 3, 9, 8)
    objective(got_of(tokens, tokens, torch.rand(2, 3, 9) < 0.5), CLOCK)
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    objective.settle(CLOCK)
    assert not torch.equal(objective.state_dict()["centering.centre"], before["centering.centre"])
    assert not objective.pending
