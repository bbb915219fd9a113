"""Softmax centring over steps against DINOv2's, and the teacher's temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.nn.centering import Centering

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_losses"
CLOCK = StepClock()


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.double() - stored.double().reshape(ours.shape)).norm() / stored.double().norm())


@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_four_steps_equal_the_reference(kind: str) -> None:
    stored = load_file(GOLDEN / "center_updates.safetensors")
    centering = Centering(64, "softmax")
    for step, temperature in enumerate(stored["in.temps"].tolist()):
        pending: dict[str, Tensor] = {}
        centering.temperature = (temperature, temperature)
        used = centering.centre.clone()
        teacher = stored[f"in.step{step}.teacher_{kind}"].reshape(-1, 64)
        targets = centering(teacher, torch.eye(64), CLOCK, pending).dense()
        assert torch.equal(centering.centre, used), "the centre moved before it was settled"
        assert off(targets, stored[f"out.step{step}.{kind}_targets"]) < 1e-5
        if step:
            assert off(used, stored[f"out.step{step}.{kind}_center_used"]) < 1e-6
        centering.settle(pending, CLOCK)
    assert off(centering.centre, stored[f"out.final.{kind}_center"]) < 1e-6


def test_micro_batches_settle_like_one_batch() -> None:
    x, weight = torch.randn(10, 4), torch.randn(6, 4)
    one, two = Centering(6, "softmax"), Centering(6, "softmax")
    pending: dict[str, Tensor] = {}
    one(x, weight, CLOCK, pending)
    one.settle(pending, CLOCK)
    pending = {}
    two(x[:3], weight, CLOCK, pending)
    two(x[3:], weight, CLOCK, pending)
    two.settle(pending, CLOCK)
    torch.testing.assert_close(one.centre, two.centre)
    torch.testing.assert_close(one.centre, 0.1 * (x @ weight.T).mean(0))


def test_the_temperature_warms_up_and_stays() -> None:
    centering = Centering(4, temperature=(0.04, 0.07), warmup=0.3)
    assert [round(centering.temperature_at(share), 4) for share in (0.0, 0.15, 0.3, 1.0)] == [
        0.04,
        0.055,
        0.07,
        0.07,
    ]
    assert Centering(4, warmup=0.0).temperature_at(0.0) == 0.07


def test_only_softmax_has_a_centre() -> None:
    assert list(Centering(4, "softmax").state_dict()) == ["centre"]
    assert not Centering(4, "sinkhorn").state_dict()
