"""Activation checkpointing: the same numbers and keys, and less kept for the backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.distributed import batch_of, engine_of
from benchmarks.distributed_cases import BASE, FULL, PLAIN, Case, generator, vtp
from benchmarks.measuring import saved_bytes
from vtp_core.engine import Engine
from vtp_core.models.vit import ViT
from vtp_core.recomputing import blocks_of, recompute
from vtp_plugins.spec import Spec

SPEC = Spec(size=(32, 32), patch=(8, 8))


class Counted(nn.Module):
    """A block that counts its computations and draws from torch's own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return x + scale * nn.functional.dropout(torch.tanh(self.linear(x)), 0.5, self.training)


class Deep(nn.Module):
    """Blocks behind another module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(Counted() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.body.blocks:  # type: ignore[union-attr]
            x = block(x, scale=0.5)
        return x


def grads(module: nn.Module, x: Tensor, **keys: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.autograd.grad(module(x, **keys).square().sum(), list(module.parameters())))


def test_blocks_at_any_depth_are_computed_twice_and_give_the_same() -> None:
    plain = Deep()
    module = copy.deepcopy(plain)
    recompute([module, module.body])  # a block that two modules hold is one block
    assert len(blocks_of([module])) == 3
    x = torch.randn(5, 4)
    for mine, own in zip(grads(module, x), grads(plain, x), strict=True):
        assert torch.equal(mine, own)
    assert [block.calls for block in blocks_of([module])] == [2, 2, 2]
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert repr(module) == repr(plain)


def test_without_gradient_a_block_is_computed_once_and_a_copy_is_its_own() -> None:
    module = Deep()
    recompute([module])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin(torch.ones(2, 4))
    twin(torch.ones(2, 4)).sum().backward()
    assert [block.calls for block in blocks_of([twin])] == [3, 3, 3]
    assert [block.calls for block in blocks_of([module])] == [0, 0, 0]


def test_a_forward_in_eval_mode_is_computed_again_in_eval_mode() -> None:
    module, x = Deep(), torch.randn(5, 4)
    aim = grads(copy.deepcopy(module).eval(), x)
    recompute([module])
    y = module.eval()(x)
    module.train()
    found = torch.autograd.grad(y.square().sum(), list(module.parameters()))
    assert all(torch.equal(mine, own) for mine, own in zip(found, aim, strict=True))
    assert all(part.training for part in module.modules())


def test_parameters_that_stand_in_for_one_forward_are_met_again() -> None:
    module = Deep()
    recompute([module])
    x = torch.randn(5, 4, requires_grad=True)
    frozen = {name: parameter.detach() for name, parameter in module.eval().named_parameters()}
    torch.func.functional_call(module, frozen, (x,)).square().sum().backward()
    assert x.grad is not None and all(p.grad is None for p in module.parameters())
    plain, y = copy.deepcopy(module), x.detach().requires_grad_()
    plain(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_the_last_block_of_which_few_tokens_are_read_is_recomputed_too(drop: float) -> None:
    from vtp_core.clock import StepClock

    encoder = ViT(SPEC, patch=8, image_size=32, width=16, depth=3, heads=2)
    x, clock = torch.randn(6, 3, 32, 32), StepClock()
    keys: dict[str, Any] = {
        "want": {"cls": 6, "patches": 2, "patches@block": 6}, "drop": drop, "clock": clock,
        "select": {"block": torch.tensor([3, 40, 41, 90])},
    }  # fmt: skip

    def found(module: nn.Module) -> list[Tensor]:
        total = torch.stack([out.square().sum() for out in module(x, **keys).values()]).sum()
        used = [p for n, p in module.named_parameters() if n != "mask_token"]
        return list(torch.autograd.grad(total, used))

    aim = found(encoder)
    kept = saved_bytes(lambda: encoder(x, **keys))
    recompute([encoder])
    assert all(torch.equal(mine, own) for mine, own in zip(found(encoder), aim, strict=True))
    assert saved_bytes(lambda: encoder(x, **keys)) < 0.35 * kept


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_keeps_less_and_moves_the_same(precision: str) -> None:
    objectives = {name: FULL[name] for name in ("clip", "dino", "ibot", "koleo")}
    sections = {**vtp({**objectives, "reconstruction": PLAIN, "flow": {}}), "generator": generator()}
    for name, depth in (("encoder", 8), ("decoder", 6)):
        sections[name] = {**BASE[name], "depth": depth, "width": 32}

    def stepped(on: bool) -> tuple[int, dict[str, Any], Engine]:
        engine = engine_of(Case("deep", sections), precision=precision, activation_checkpointing=on)
        rows: list[dict[str, float]] = []
        kept = saved_bytes(lambda: rows.append(engine.step(batch_of(engine, 0))))
        return kept, rows[0], engine

    (kept, row, engine), (less, same, other) = stepped(False), stepped(True)
    assert same == row
    for part, tensors in engine.state().items():
        for key, value in tensors.items():
            assert torch.equal(other.state()[part][key], value), key
    assert less < 0.4 * kept
