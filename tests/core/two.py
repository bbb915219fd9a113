"""What each of two processes does, and one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from rig import batch_of, close, engine_of, gradients, weights

from vtp_core.errors import NonFinite

OBJECTIVES: dict[str, Any] = {
    "rebuild": {"weight": {"l2": 0.5, "l1": 2.0}, "rows": 0.5},
    "distil": {"head": "head", "weight": 0.7},
    "masked": {"head": "head", "rows": 0.5},  # another number of masked places on each process
    "contrast": {"rows": 0.75, "weight": 0.1, "draws": True},
    "drift": {"weight": 0.3, "repeat": 2},
    "repa": {"weight": 0.2, "through": ["generator"], "cut": [], "every": 2},
    "fool": {"critic": {"order": "before"}, "balance": {"against": "rebuild"}},
    "fresh": {"use": "fool", "weight": 0.1, "critic": {"input": "fresh"}},
}
SECTIONS: dict[str, Any] = {
    "modules": {"head": {}},
    "generator": {
        "use": "denoiser",
        "path": {"use": "straight"},
        "condition": "label",
        "drop_condition": 0.3,
    },
    "teachers": {"judge": {}},
    "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise"}],
    "encoder": {"use": "patches", "jitter": 0.3},
    "train": {"max_grad_norm": 1.0},
}
STEPS = 3
Found = dict[str, Any]


def trained() -> Found:
    """Gradients of the first step, rows, and the weights at the end."""
    engine = engine_of(OBJECTIVES, batch=16, **SECTIONS)
    first, row = gradients(engine, batch_of(engine, 0))
    rows = [row, *(engine.step(batch_of(engine, step)) for step in range(1, STEPS))]
    return {"gradients": first, "rows": rows, "weights": weights(engine)}


def stopped() -> str:
    """What the error says when only one process meets a NaN."""
    engine = engine_of({"rebuild": {}, "sick": {"at": 99}}, batch=16, **SECTIONS)
    if dist.get_rank() == 0:
        engine.model.objectives["sick"].at = 0
    before = weights(engine)
    with pytest.raises(NonFinite) as caught:
        engine.step(batch_of(engine))
    close(weights(engine), before, 0)
    return str(caught.value)
