"""Sinkhorn targets against DINOv2's, and where the textbook form breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.nn import chunked
from vtp_core.nn.sinkhorn import sinkhorn

GOLDEN = Path(__file__).parents[1] / "golden" / "dinov2_losses"
CLOCK = StepClock()


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.double() - stored.double()).norm() / stored.double().norm())


@pytest.mark.parametrize(
    ("iterations", "name"), [(3, "targets"), (1, "targets_iter1"), (10, "targets_iter10")]
)
def test_targets_equal_the_reference(iterations: int, name: str) -> None:
    stored = load_file(GOLDEN / "cls_loss.safetensors")
    targets = sinkhorn(stored["in.teacher_logits"], torch.eye(64), 0.05, CLOCK, iterations)
    assert off(targets.dense(), stored[f"out.sinkhorn.{name}"]) < 1e-5


def test_patch_targets_equal_the_reference() -> None:
    stored = load_file(GOLDEN / "ibot.safetensors")
    targets = sinkhorn(stored["in.teacher_masked_logits"], torch.eye(64), 0.05, CLOCK)
    assert off(targets.dense(), stored["out.sinkhorn.targets"]) < 1e-5


def test_many_blocks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(40, 8), torch.randn(96, 8)
    whole = sinkhorn(x, weight, 0.5, CLOCK).dense()
    monkeypatch.setattr(chunked, "_SMALLEST", 200)
    assert len(list(chunked.blocks(96, 40))) > 10
    torch.testing.assert_close(sinkhorn(x, weight, 0.5, CLOCK).dense(), whole)


def test_many_iterations_use_prototypes_evenly() -> None:
    targets = sinkhorn(torch.randn(64, 8), torch.randn(16, 8), 1.0, CLOCK, 100).dense()
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    torch.testing.assert_close(targets.sum(0), torch.full((16,), 4.0), rtol=1e-3, atol=0)


def test_scores_that_overflow_the_textbook_form_give_finite_targets() -> None:
    targets = sinkhorn(torch.randn(16, 32) * 100, torch.eye(32), 0.04, CLOCK).dense()
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(16))


def test_no_rows_give_no_targets() -> None:
    assert sinkhorn(torch.empty(0, 4), torch.randn(8, 4), 0.1, CLOCK).dense().shape == (0, 8)


def test_float64_stays_float64() -> None:
    assert (
        sinkhorn(torch.randn(4, 4).double(), torch.eye(4).double(), 0.1, CLOCK).dense().dtype == torch.float64
    )
