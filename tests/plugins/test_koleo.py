"""KoLeo against DINOv2's, and over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_koleo import KoLeo
from vtp_plugins import Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_losses"
CLOCK = StepClock()
Off = Callable[[Tensor, Tensor], float]


def test_values_and_gradient_equal_dinov2s(off: Off) -> None:
    stored = load_file(GOLDEN / "koleo.safetensors")
    x = stored["in.student_cls"].requires_grad_()
    halves = x.unflatten(0, (2, 5))
    objective = KoLeo(Spec(width=32))
    for index in range(2):
        one = objective({"student": Outputs({"cls": halves[index : index + 1]})}, CLOCK)["spread"]
        assert off(one, stored[f"out.chunk{index}"]) < 1e-5
    loss = 0.1 * objective({"student": Outputs({"cls": halves})}, CLOCK)["spread"]
    loss.backward()
    assert off(x.grad, stored["grad.student_cls_weight0p1"]) < 1e-5


def test_one_crop_set_of_the_whole_batch_equals_dinov3s(off: Off) -> None:
    stored = load_file(GOLDEN / "koleo.safetensors")
    x = stored["in.student_cls"].requires_grad_()
    loss = KoLeo(Spec(width=32))({"student": Outputs({"cls": x[None]})}, CLOCK)["spread"]
    loss.backward()
    assert off(loss, stored["out.v3.topk1"]) < 1e-5
    assert off(x.grad, stored["grad.v3.topk1"]) < 1e-5


def test_two_processes_give_the_loss_and_gradient_of_one(ranks: Callable[..., list[Any]], off: Off) -> None:
    x = torch.randn(2, 6, 8).double().requires_grad_()
    objective = KoLeo(Spec(width=8))

    def share(clock: StepClock) -> Tensor:
        rows = slice(None) if clock.world == 1 else slice(clock.rank * 3, clock.rank * 3 + 3)
        return objective({"student": Outputs({"cls": x[:, rows]})}, clock)["spread"]

    alone, together = share(CLOCK), torch.stack(ranks(2, share)).mean()
    assert off(together, alone) < 1e-12
    assert off(torch.autograd.grad(together, x)[0], torch.autograd.grad(alone, x)[0]) < 1e-10


def test_one_row_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="raise its 'rows' or batch_size"):
        KoLeo(Spec(width=8))({"student": Outputs({"cls": torch.randn(2, 1, 8)})}, CLOCK)


def test_equal_rows_stay_finite() -> None:
    x = torch.ones(1, 4, 8, requires_grad=True)
    KoLeo(Spec(width=8))({"student": Outputs({"cls": x})}, CLOCK)["spread"].backward()
    assert x.grad is not None and x.grad.isfinite().all()
