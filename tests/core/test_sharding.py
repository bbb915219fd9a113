"""Weights that are dealt over processes train as whole ones do, and can be measured."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from dealt import averaged, looked_at, narrow, row_error, state_error, total_error, trained
from pool import Pool

alone = functools.cache(
    lambda name, steps=2, precision="float64": trained(name, steps, {"precision": precision})
)


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("vtp with a gan", {}),
        ("vtp with a generator", {"activation_checkpointing": True, "accumulate": 4}),
        ("cut", {}),
        ("align: repa-e", {}),
    ],
)
def test_dealt_weights_train_as_those_of_one_process(two: Pool, name: str, train: dict[str, Any]) -> None:
    one = alone(name)
    for found in two(trained, name, 2, {"precision": "float64", **train}):
        assert row_error(found, one) <= 1e-10
        assert state_error(found, one) <= 1e-10


def test_a_run_says_how_its_batch_is_split_and_what_is_dealt(two: Pool) -> None:
    first, second = two(trained, "align: repa-e", 0, {"accumulate": 2})
    assert (
        first["said"]
        == second["said"]
        == [
            "2 processes (gloo, fsdp2) x 4 rows x 2 micro-batches = batch_size 16",
            "fsdp2 deals encoder, bottleneck, decoder, align, through; whole in every process: generator (an "
            "objective passes gradient through it), teachers/lite0 (is frozen)",
        ]
    )
    assert trained("vtp with a gan", 0)["said"] == [
        "train.parallel=fsdp2: one process holds all weights; nothing is dealt"
    ]
    assert two(trained, "vtp with a gan", 0, {})[0]["said"][1] == (
        "fsdp2 deals encoder, bottleneck, decoder, clip; whole in every process: modules/prototypes (shared with dino, "
        "ibot), dino (shared with ibot, modules/prototypes), ibot (shared with dino, modules/prototypes), gan (its "
        "critic has a turn of its own)"
    )
    assert alone("koleo: cls", 0)["said"][:-1] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dealt_average_is_the_closed_form_after_500_steps(two: Pool, dtype: torch.dtype) -> None:
    for far, same in two(averaged, dtype):
        assert far <= 1e-6
        assert same


def test_bfloat16_weights_travel_and_float32_ones_stay(two: Pool) -> None:
    first, _ = two(narrow)
    narrowed = {name for name, dtypes in first["seen"].items() if dtypes == {torch.bfloat16}}
    assert narrowed == {"encoder", "bottleneck", "decoder", "generator"}
    assert first["seen"]["clip"] == first["seen"]["gradients"] == {torch.float32}
    assert first["kept"] <= {torch.float32, torch.int64}
    whole = two(trained, "vtp with a generator", 2, {"precision": "bfloat16", "parallel": "replicated"})[0]
    losses = [[row["loss"] for row in found["rows"]] for found in (first, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_probe_has_whole_modules_to_itself(two: Pool) -> None:
    nobody, found = two(looked_at)
    assert nobody == {}
    for name, value in looked_at().items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- 30 steps, as D4 has it


STACKS = ["vtp", "vtp with a generator", "vtp with a gan", "vtp without coupled objectives"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", STACKS)
def test_thirty_steps_in_both_modes(two: Pool, four: Pool, name: str, world: int) -> None:
    """Losses to 1e-5 and weights to 1e-4 in float32, everything to 1e-10 in float64.

    Terms and momenta that cancel out to nearly zero have no relative error in float32: a critic's mean logit, the
    gradient of a bias before a batch norm.
    """
    pool = {2: two, 4: four}[world]
    for train in ({}, {"parallel": "replicated"}, {"activation_checkpointing": True, "accumulate": 4}):
        found = pool(trained, name, 30, {"precision": "float32", **train}, timeout=600)[0]
        assert total_error(found, alone(name, 30, "float32")) <= 1e-5, train
        assert state_error(found, alone(name, 30, "float32"), besides="optimizer") <= 1e-4, train
        found = pool(trained, name, 30, {"precision": "float64", **train}, timeout=600)[0]
        assert row_error(found, alone(name, 30)) <= 1e-10, train
        assert state_error(found, alone(name, 30)) <= 1e-10, train
