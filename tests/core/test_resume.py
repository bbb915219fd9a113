"""A checkpoint is everything: a fresh engine goes on bit by bit, and nothing in it is superfluous."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, run, weights
from torch import Tensor

from vtp_core.engine import Engine
from vtp_core.errors import StackFault

OBJECTIVES: dict[str, Any] = {
    "rebuild": {},
    "distil": {"head": "head"},
    "masked": {"head": "head"},
    "contrast": {"draws": True, "rows": 0.5},
    "drift": {"repeat": 2},
    "repa": {"start": 2, "through": ["generator"], "cut": []},
    "fool": {"balance": {"against": "rebuild"}},
}
SECTIONS: dict[str, Any] = {
    "modules": {"head": {}},
    "teachers": {"judge": {}},
    "generator": {
        "use": "denoiser",
        "path": {"use": "straight"},
        "condition": "label",
        "drop_condition": 0.2,
    },
    "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise"}],
    "encoder": {"use": "patches", "jitter": 0.2},
}
STEPS = 3


def engine() -> Engine:
    return engine_of(OBJECTIVES, **SECTIONS)


def saved(trained: Engine) -> dict[str, dict[str, Tensor]]:
    return {
        part: {key: value.clone() for key, value in tensors.items()}
        for part, tensors in trained.state().items()
    }


@pytest.fixture(scope="module")
def checkpoint() -> tuple[dict[str, dict[str, Tensor]], list[dict[str, float]], dict[str, Tensor]]:
    """Parts after some steps, the rows of the next five, and where they lead."""
    undisturbed = engine()
    run(undisturbed, STEPS)
    parts = saved(undisturbed)
    rows = run(undisturbed, 5, first=STEPS)
    return parts, rows, weights(undisturbed)


def resumed(parts: dict[str, dict[str, Tensor]]) -> Engine:
    other = engine_of(OBJECTIVES, **{**SECTIONS, "train": {}})
    other.load(parts, STEPS)
    return other


def test_a_resumed_run_is_bit_identical(checkpoint: Any) -> None:
    parts, rows, last = checkpoint
    other = resumed(parts)
    assert run(other, 5, first=STEPS) == rows
    close(weights(other), last, 0)


def test_loading_does_not_share_memory_with_the_checkpoint(checkpoint: Any) -> None:
    parts, _, _ = checkpoint
    before = {part: {key: value.clone() for key, value in tensors.items()} for part, tensors in parts.items()}
    run(resumed(parts), 1, first=STEPS)
    for part, tensors in before.items():
        close(parts[part], tensors, 0)


def test_every_part_of_the_state_counts(checkpoint: Any) -> None:
    """Zero one part after the other: the run that follows differs each time, so none is saved in vain."""
    parts, rows, last = checkpoint
    assert {name for name, tensors in parts.items() if tensors} == {
        "tokenizer", "generator", "modules/head", "teacher", "optimizer", "optimizer/fool",
        "objectives/distil", "objectives/contrast", "objectives/repa", "objectives/fool",
    }  # fmt: skip
    for name, tensors in parts.items():
        if tensors:
            broken = {**parts, name: {key: torch.zeros_like(value) for key, value in tensors.items()}}
            other = resumed(broken)
            again = run(other, 5, first=STEPS)
            differs = [key for key, value in weights(other).items() if not torch.equal(value, last[key])]
            assert again != rows or differs, name


def test_every_tensor_of_the_model_counts(checkpoint: Any) -> None:
    parts, _, _ = checkpoint
    for name in (
        "tokenizer",
        "generator",
        "modules/head",
        "objectives/distil",
        "objectives/contrast",
        "objectives/fool",
    ):
        for key, value in parts[name].items():
            if key != "encoder.mask_token" or value.any():
                changed = resumed({**parts, name: {**parts[name], key: value + 1}})
                assert not torch.equal(changed.state()[name][key], value), key


def test_a_step_count_that_differs_draws_differently(checkpoint: Any) -> None:
    parts, rows, _ = checkpoint
    other = engine()
    other.load(parts, STEPS + 1)
    assert run(other, 1, first=STEPS)[0]["drift/drift"] != rows[0]["drift/drift"]


def test_weights_that_do_not_fit_are_an_error(checkpoint: Any) -> None:
    parts, _, _ = checkpoint
    with pytest.raises(StackFault, match="encoder: the weights do not fit the stack"):
        resumed({**parts, "tokenizer": {k: v for k, v in parts["tokenizer"].items() if "embed" not in k}})
    with pytest.raises(StackFault, match=r"objectives/distil: missing \['centre'\]"):
        resumed({**parts, "objectives/distil": {}})
    with pytest.raises(StackFault, match="which the stack does not train"):
        engine_of({"read": {}}).load(parts, STEPS)


def test_initial_weights_depend_on_the_seed_and_the_place_alone() -> None:
    alone, among = engine_of({"rebuild": {}}), engine()
    close(alone.state()["tokenizer"], among.state()["tokenizer"], 0)
    other = engine_of({"rebuild": {}}, train={"seed": 1})
    assert not torch.equal(
        other.state()["tokenizer"]["encoder.embed.weight"], alone.state()["tokenizer"]["encoder.embed.weight"]
    )


def test_adding_an_objective_that_draws_leaves_other_draws_alone() -> None:
    one, two = (
        engine_of({"drift": {}}, **SECTIONS),
        engine_of({"drift": {}, "contrast": {"draws": True}}, **SECTIONS),
    )
    batch = batch_of(two)
    assert one.step(batch)["drift/drift"] == two.step(batch)["drift/drift"]
