from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtp_core.models import fused
from vtp_core.models.rope import Rope


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_by_hand_equals_its_definition() -> None:
    x, weight = draws(2, 3, 8).requires_grad_(), draws(8, seed=1).requires_grad_()
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), expected)
    assert torch.autograd.gradcheck(lambda a, b: fused.rms_norm(a, b, 1e-5), (x, weight))


def test_rms_norm_reads_and_passes_back_any_layout() -> None:
    x, weight = draws(4, 3, 8).requires_grad_(), draws(8, seed=1).requires_grad_()
    turned = fused.rms_norm(x.transpose(0, 1)[1:], weight, 1e-5)
    (grad,) = torch.autograd.grad(turned.transpose(0, 1).sum(0).sum(), x)
    (expected,) = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-5)[:, 1:].sum(), x)
    torch.testing.assert_close(grad, expected)


def test_half_precision_is_normalised_in_float32_and_cast_before_the_weight() -> None:
    x, weight = draws(5, 8).bfloat16(), draws(8, seed=1).float()
    y = x.float()
    expected = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).bfloat16() * weight
    assert torch.equal(fused.rms_norm(x, weight, 1e-5), expected)


def test_the_gate_equals_its_definition() -> None:
    a, b = draws(3, 8).requires_grad_(), draws(3, 8, seed=1).requires_grad_()
    torch.testing.assert_close(fused.gate(a, b), F.silu(a) * b)
    assert torch.autograd.gradcheck(fused.gate, (a, b))


@pytest.mark.parametrize("normalised", [True, False])
def test_heads_by_hand_equal_the_plain_form(normalised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = draws(2, 7, 48).requires_grad_()
    scales = (draws(8, seed=1).requires_grad_(), draws(8, seed=2).requires_grad_()) if normalised else None
    tables = Rope(8, 2).tables((2, 3), qkv, prefix=1)

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = None if scales is None else (inputs[1], inputs[2])
        return fused.heads(inputs[0], 2, given, 1e-5, tables)

    by_hand = run(qkv, *(scales or ()))
    assert torch.autograd.gradcheck(run, (qkv, *(scales or ())))
    monkeypatch.setattr(fused, "by_hand", lambda x: False)
    for ours, plain in zip(by_hand, run(qkv, *(scales or ())), strict=True):
        torch.testing.assert_close(ours, plain)


def test_heads_keep_prefix_tokens_as_they_are() -> None:
    qkv = draws(1, 5, 24)
    q, _, v = fused.heads(qkv, 1, None, 1e-5, Rope(8, 2).tables((2, 2), qkv, prefix=1))
    assert torch.equal(q[0, 0, 0], qkv[0, 0, :8])
    assert not torch.equal(q[0, 0, 1], qkv[0, 1, :8])
    assert torch.equal(v[0, 0], qkv[0, :, 16:])
