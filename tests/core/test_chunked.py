"""Chunked losses: values, gradients and memory against the textbook's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vtp_core.clock import StepClock
from vtp_core.nn import chunked
from vtp_core.nn.chunked import blocks, contrastive, cross_entropy_terms, log_sum_exp, softplus_sum
from vtp_core.nn.sinkhorn import sinkhorn

GOLDEN = Path(__file__).parents[1] / "golden" / "open_clip_losses"
CLOCK = StepClock()


def off(ours: Tensor, stored: Tensor) -> float:
    ours, stored = ours.detach().double(), stored.detach().double()
    return float((ours - stored).norm() / stored.norm())


def peak(work: Callable[[], Any]) -> int:
    """Bytes that ``work`` holds at most, beyond what was there."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def sphere(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1)


def cross_entropy(x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    targets = sinkhorn(teacher, teacher_weight, 0.05, CLOCK)
    normaliser, mean = cross_entropy_terms(x / 0.1, weight, targets)
    return (normaliser - (x / 0.1 * mean).sum(1)).mean()


def textbook(x: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    with torch.no_grad():
        plan = (teacher @ teacher_weight.T / 0.05).exp()
        plan /= plan.sum()
        for _ in range(3):
            plan /= plan.sum(0, keepdim=True) * len(teacher_weight)
            plan /= plan.sum(1, keepdim=True) * len(teacher)
        plan *= len(teacher)
    return -(plan * (x @ weight.T / 0.1).log_softmax(1)).sum(1).mean()


def test_blocks_cover_every_column_once() -> None:
    for rows, columns in [(1, 1), (0, 7), (300, 1024), (4096, 131072)]:
        parts = list(blocks(rows, columns))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(columns))
        assert rows * (parts[0].stop - parts[0].start) <= max(2**20, rows * columns // 32 + rows)


def test_a_large_matrix_is_blocked_and_agrees_with_the_textbook() -> None:
    torch.manual_seed(0)
    x, weight = sphere(128, 16).requires_grad_(), sphere(16384, 16).requires_grad_()
    teacher, teacher_weight = sphere(128, 16), sphere(16384, 16)
    assert len(list(blocks(128, 16384))) > 1
    ours, stored = (f(x, weight, teacher, teacher_weight) for f in (cross_entropy, textbook))
    assert off(ours, stored) < 1e-5
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight)), torch.autograd.grad(stored, (x, weight)), strict=True
    ):
        assert off(a, b) < 1e-5


def test_131072_prototypes_take_at_most_15_percent_of_the_scores_memory() -> None:
    torch.manual_seed(0)
    x, weight = sphere(256, 8).requires_grad_(), sphere(131072, 8).requires_grad_()
    teacher, teacher_weight = sphere(256, 8), sphere(131072, 8)
    one = 256 * 131072 * 4
    ours = peak(lambda: torch.autograd.grad(cross_entropy(x, weight, teacher, teacher_weight), (x, weight)))
    assert ours <= 0.15 * one


def test_derivatives_are_right_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_SMALLEST", 8)
    x, weight = (torch.randn(3, 2).double().requires_grad_(), torch.randn(5, 2).double().requires_grad_())
    bias = torch.tensor(-0.5).double().requires_grad_()
    targets = sinkhorn(torch.randn(4, 2).double(), torch.randn(5, 2).double(), 0.5, CLOCK)
    assert torch.autograd.gradcheck(log_sum_exp, (x, weight))
    assert torch.autograd.gradcheck(softplus_sum, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda a, b: cross_entropy_terms(a, b, targets), (x, weight))


@pytest.mark.parametrize("form", ["clip", "siglip"])
def test_contrastive_losses_equal_open_clips(form: str) -> None:
    stored = load_file(GOLDEN / "single.safetensors")
    image, text = stored["in.image_features"].requires_grad_(), stored["in.text_features"].requires_grad_()
    scale = stored[f"in.{form}_logit_scale_log"].requires_grad_()
    inputs = {"image_features": image, "text_features": text, "logit_scale_log": scale}
    bias = None
    if form == "siglip":
        bias = inputs["logit_bias"] = stored["in.siglip_logit_bias"].requires_grad_()
    loss = contrastive(image, text, scale.exp(), CLOCK, bias, "sigmoid" if form == "siglip" else "softmax")
    loss.backward()
    assert off(loss, stored[f"out.{form}.plain.loss"]) < 1e-5
    for name, tensor in inputs.items():
        assert off(tensor.grad, stored[f"grad.{form}.plain.{name}"]) < 1e-5, name


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_pairs_in_blocks_agree_with_the_textbook(form: Any) -> None:
    torch.manual_seed(0)
    a, b = sphere(2048, 16).requires_grad_(), sphere(2048, 16).requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    scores = scale * a @ b.T
    if form == "softmax":
        rows = torch.arange(2048)
        stored = (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2
    else:
        stored = -F.logsigmoid((2 * torch.eye(2048) - 1) * (scores + bias)).sum() / 2048
    ours = contrastive(a, b, scale, CLOCK, bias, form)
    assert off(ours, stored) < 1e-5
    for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(stored, (a, b)), strict=True):
        assert off(x, y) < 1e-5


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pairs", [4096, pytest.param(32768, marks=pytest.mark.slow)])
def test_pairs_take_at_most_15_percent_of_the_scores_memory(form: Any, pairs: int) -> None:
    a, b = sphere(pairs, 8).requires_grad_(), sphere(pairs, 8).requires_grad_()
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    used = peak(lambda: torch.autograd.grad(contrastive(a, b, scale, CLOCK, bias, form), (a, b)))
    assert used <= 0.15 * pairs**2 * 4


def test_autocast_does_not_lower_the_precision() -> None:
    x, weight = sphere(4, 8).requires_grad_(), sphere(16, 8)
    plain = log_sum_exp(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = log_sum_exp(x, weight)
        (grad,) = torch.autograd.grad(cast.sum(), x)
    assert torch.equal(plain, cast)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), x)[0])
