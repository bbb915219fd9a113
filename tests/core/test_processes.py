"""Two real processes over gloo are one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from rig import close
from two import trained, worker


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = trained()
    for found in both:
        close(found["gradients"], one["gradients"])
        for ours, alone in zip(found["rows"], one["rows"], strict=True):
            assert ours == pytest.approx(alone, rel=1e-9, abs=1e-12)
        close(found["weights"], one["weights"], 1e-8)  # Adam divides by roots of what is nearly zero
    close(both[0]["weights"], both[1]["weights"], 0)
    assert both[0]["error"] == both[1]["error"]
    assert "sick/sick" in both[0]["error"]
