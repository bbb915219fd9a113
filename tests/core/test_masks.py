"""Block masks: DINOv2's statistics, stratified ratios, the same masks for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vtp_core.clock import StepClock
from vtp_core.data.masks import Block
from vtp_core.data.order import key
from vtp_plugins.protocols import MaskSampler

# mean count, its variance, mean edges, their variance over 1,000 draws of dinov2 and dinov3 (14 x 14 patches)
REFERENCE = {
    (False, 20): (19.934, 0.0637, 26.44, 26.0),
    (False, 49): (48.930, 0.0692, 41.34, 66.1),
    (False, 98): (97.895, 0.1581, 50.70, 78.0),
    (True, 20): (20.0, 0.0, 26.84, 29.5),
    (True, 49): (49.0, 0.0, 41.58, 64.8),
    (True, 98): (98.0, 0.0, 51.88, 83.2),
}


def edges(mask: np.ndarray) -> int:
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())


@pytest.mark.parametrize(("exact", "target"), list(REFERENCE))
def test_counts_and_compactness_are_the_references(exact: bool, target: int) -> None:
    block = Block("global", exact=exact)
    masks = [block.draw(target, (14, 14), key("test", i)).reshape(14, 14) for i in range(1000)]
    count, spread, rim, rim_spread = REFERENCE[exact, target]
    assert abs(np.mean([m.sum() for m in masks]) - count) <= max(0.1, 5 * (2 * spread / 1000) ** 0.5)
    assert abs(np.mean([edges(m) for m in masks]) - rim) <= max(0.1, 5 * (2 * rim_spread / 1000) ** 0.5)
    assert all(m.sum() <= target for m in masks)


def test_places_are_hidden_as_often_as_in_the_reference() -> None:
    block = Block("global")
    rate = np.mean([block.draw(49, (14, 14), key("place", i)).reshape(14, 14) for i in range(3000)], axis=0)
    assert rate[6:8, 6:8].mean() == pytest.approx(0.432, abs=0.04)
    assert rate[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx(0.036, abs=0.02)
    assert np.abs(rate - rate[::-1, ::-1]).max() < 0.06


def test_half_of_the_crops_are_masked_with_stratified_ratios() -> None:
    masks = Block("global", exact=True)(2, 64, (14, 14), StepClock(step=1))
    assert masks.shape == (2, 64, 196)
    assert masks.dtype == torch.bool
    hidden = masks.sum(-1).flatten()
    assert int((hidden > 0).sum()) == 64
    ratios = (hidden[hidden > 0].sort().values + 0.5) / 196
    bins = 0.1 + 0.4 * torch.arange(65) / 64
    assert (ratios >= bins[:-1] - 0.01).all()
    assert (ratios <= bins[1:] + 0.01).all()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("micros", [1, 2])
def test_any_number_of_processes_and_micro_batches_sees_the_same_masks(world: int, micros: int) -> None:
    block = Block("global")
    whole = block(2, 16, (8, 8), StepClock(seed=7, step=4))
    rows = 16 // (world * micros)
    for rank in range(world):
        for micro in range(micros):
            clock = StepClock(seed=7, step=4, world=world, rank=rank, micro=micro, micros=micros)
            assert torch.equal(block(2, rows, (8, 8), clock), whole[:, clock.positions(rows)])


def test_a_single_row_per_process_works() -> None:
    whole = Block("global")(2, 2, (8, 8), StepClock())
    assert torch.equal(Block("global")(2, 1, (8, 8), StepClock(world=2, rank=1)), whole[:, 1:])


def test_steps_differ_and_repeat() -> None:
    block = Block("global")
    first, again = (block(2, 8, (8, 8), StepClock(step=1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, block(2, 8, (8, 8), StepClock(step=2)))


def test_no_block_spans_a_side() -> None:
    block = Block("global", largest=1.0)
    for i in range(200):
        grown = block._grow(0, 64, (8, 8), iter(np.random.default_rng(i).random(40).tolist()))
        cells = np.array([[grown >> (8 * r + c) & 1 for c in range(8)] for r in range(8)])
        assert cells.any(0).sum() < 8
        assert cells.any(1).sum() < 8


def test_nothing_and_everything_masked() -> None:
    assert not Block("global", probability=0.0)(2, 4, (8, 8), StepClock()).any()
    assert Block("global", probability=1.0)(2, 4, (8, 8), StepClock()).any(-1).all()


def test_it_is_a_mask_sampler_that_refuses_other_grids_and_senseless_options() -> None:
    assert isinstance(Block("global"), MaskSampler)
    assert Block("global") == Block("global", 0.5)
    with pytest.raises(ValueError, match="grid"):
        Block("global")(1, 2, (16,), StepClock())
    with pytest.raises(ValueError, match="probability"):
        Block("global", probability=1.5)
    with pytest.raises(ValueError, match="ratio"):
        Block("global", ratio=(0.5, 0.1))
