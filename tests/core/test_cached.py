"""Objectives that need the whole batch get it from micro-batches, in two passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, gradients, weights
from two import OBJECTIVES, SECTIONS

from benchmarks.distributed import batch_of as noise_for
from benchmarks.distributed import engine_of as engine_for
from benchmarks.distributed_cases import BASE, TEXT, Case
from benchmarks.measuring import saved_bytes
from vtp_core.cached import whole_batch
from vtp_core.engine import Engine
from vtp_core.errors import NonFinite
from vtp_core.kept import _merged, _Slot
from vtp_plugins.needs import Outputs

# Every pattern at once: coupled losses, sub-batches, repeats, masks, two critics, a balance, a frozen passage.
MIX: dict[str, Any] = {**OBJECTIVES, "fool": {**OBJECTIVES["fool"], "rows": 0.5}}


def accumulating(count: int, objectives: dict[str, Any] = MIX, **train: Any) -> Engine:
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "accumulate": count, **train}}
    return engine_of(objectives, batch=16, **sections)


@pytest.mark.parametrize("count", [2, 4])
def test_any_mix_of_objectives_accumulates(count: int) -> None:
    one, many = accumulating(1), accumulating(count)
    (first, row), (found, same) = gradients(one, batch_of(one)), gradients(many, batch_of(many))
    close(found, first)
    assert same == pytest.approx(row, rel=1e-9, abs=1e-12)
    for step in range(1, 3):
        assert many.step(batch_of(many, step)) == pytest.approx(
            one.step(batch_of(one, step)), rel=1e-9, abs=1e-12
        )
    close(weights(many), weights(one), 1e-8)  # Adam divides by roots of what is nearly zero


def test_who_needs_the_whole_batch() -> None:
    assert whole_batch(accumulating(1).model) == {"masked", "contrast", "fool", "rebuild"}


def test_critics_and_objectives_are_asked_once_a_step() -> None:
    engine = accumulating(4)
    asked: list[str] = []
    for name, objective in engine.model.objectives.items():
        objective.register_forward_hook(lambda *_, name=name: asked.append(name))
    engine.step(batch_of(engine))
    whole = whole_batch(engine.model)
    assert {name: asked.count(name) for name in ("contrast", "fool", "distil", "drift")} == {
        "contrast": 1, "fool": 1, "distil": 4, "drift": 8,
    }  # fmt: skip
    assert whole - set(asked) == set()


def test_a_loss_that_is_not_finite_is_named_in_either_pass() -> None:
    for sick in ({"use": "sick", "at": 1}, {"use": "sick", "at": 1, "gradient": True}):
        engine = accumulating(2, {**MIX, "sick": sick})
        engine.step(batch_of(engine))
        before = weights(engine)
        with pytest.raises(NonFinite, match="sick"):
            engine.step(batch_of(engine, 1))
        close(weights(engine), before, 0)
        assert not any(objective.pending for objective in engine.model.objectives.values())


def test_forwards_of_one_micro_batch_are_kept_at_a_time() -> None:
    sections = {"objectives": {"clip": TEXT, "koleo": {}}, "encoder": {**BASE["encoder"], "depth": 8}}

    def kept(count: int) -> int:
        engine = engine_for(Case("two towers", sections, batch=64), precision="float32", accumulate=count)
        return saved_bytes(lambda: engine.step(noise_for(engine, 0)))

    assert kept(4) < 0.5 * kept(1)  # the rest is the text tower's, of all rows


def test_masked_places_of_micro_batches_merge_in_the_order_of_the_merged_mask() -> None:
    torch.manual_seed(0)
    mask, features = torch.rand(2, 6, 5) < 0.4, torch.randn(2, 6, 5, 3)
    slots = []
    for micro in range(3):
        own, hidden = features[:, micro::3], mask[:, micro::3]
        slots.append(_Slot(Outputs({"patches@some": own[hidden]}), {"some": hidden}, frozenset()))
    assert torch.equal(_merged(slots, "patches@some"), features[mask])
