"""Modules that few people write train with dealt weights as with whole ones, or are told what to change."""

from __future__ import annotations

from pathlib import Path

import odd
import pytest
import torch
from dealt import row_error, state_error
from pool import Pool

from vtp_core.attribution import _words


@pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="FSDP2 leaves out what one process has no gradient for"
)
def test_weights_that_only_one_process_uses_train_as_whole_ones_do(two: Pool) -> None:
    """One that nobody uses stays as it is, weight decay or not."""
    dealt, replicated = (
        two(odd.trained, "koleo: cls", "branching", kind) for kind in ("fsdp2", "replicated")
    )
    for found, one in zip(dealt, replicated, strict=True):
        assert row_error(found, one) <= 1e-10
        assert state_error(found, one) <= 1e-10
    names = [name for name in dealt[0]["state"] if name.startswith("optimizer/")]
    assert any("koleo.sometimes" in name for name in names)
    assert not any("koleo.never" in name for name in names)


def test_a_loss_without_a_gradient_in_one_process_is_told_before_anybody_waits(two: Pool) -> None:
    for said in two(odd.refused, "kl: sum", "constant"):
        assert said.startswith(
            "PluginFault: train.parallel=fsdp2: in this step gradient reaches bottleneck in process 0 and not in "
            "process 1; an objective has a loss without a gradient in some processes"
        )


@pytest.mark.parametrize("change", ["tied_layers", "tied_weights"])
def test_blocks_that_share_weights_are_dealt_in_one_piece(two: Pool, change: str) -> None:
    one = odd.trained("kl: sum", change, "replicated")
    for found in two(odd.trained, "kl: sum", change, "fsdp2"):
        assert row_error(found, one) <= 1e-10
        assert state_error(found, one) <= 1e-10


def test_weights_that_hold_nothing_are_saved_and_loaded(two: Pool, tmp_path: Path) -> None:
    assert two(odd.reloaded, "registers", str(tmp_path)) == [True, True]


def test_a_layer_that_is_called_past_its_block_is_explained(two: Pool) -> None:
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor") as caught:
        two(odd.trained, "kl: sum", "within", "fsdp2")
    assert "train.parallel=fsdp2: weights are whole only while `forward`" in _words(caught.value)
