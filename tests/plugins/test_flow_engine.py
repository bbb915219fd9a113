"""Paths and their objective in stacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import batch_of, engine_of, gradients, owners

from vtp_flow import DDPM
from vtp_plugins.errors import StackFault

VIEWS: dict[str, Any] = {"image": {"use": "whole"}}


def generator(**path: Any) -> dict[str, Any]:
    return {"use": "denoiser", "path": path}


def test_a_stack_trains_its_generator_and_nothing_else() -> None:
    laws = [{"law": "logit_normal", "mu": 0.4, "until": 0.5}, {}]
    path = generator(use="linear", shift="from_latent", shift_base=4, laws=laws)
    objectives = {"flow": {"cosine": 0.5, "weighting": "min_snr"}}
    engine = engine_of(objectives, views=VIEWS, generator=path)
    assert engine.model.path.levels.shift == 2.0  # 4 channels of 2 x 2
    assert [law.until for law in engine.model.path.levels.laws] == [0.5, None]
    batch = batch_of(engine)
    found, _ = gradients(engine, batch)
    assert owners(found) == {"generator"}
    rows = [engine.step(batch) for _ in range(2)]
    assert rows[0]["flow/mse"] != rows[1]["flow/mse"]  # other levels, other noise
    one, other = (engine_of(objectives, views=VIEWS, generator=path).step(batch) for _ in range(2))
    assert one == other  # draws are the clock's


def test_an_uncut_latent_trains_the_tokenizer_too() -> None:
    engine = engine_of({"flow": {"cut": False}}, views=VIEWS, generator=generator(use="gvp"))
    found, _ = gradients(engine, batch_of(engine))
    assert owners(found) == {"encoder", "bottleneck", "generator"}


def test_a_discrete_process_runs_in_a_stack() -> None:
    path = generator(use="ddpm", predicts="data", timesteps=100)
    engine = engine_of({"flow": {"weighting": "min_snr"}}, views=VIEWS, generator=path)
    assert isinstance(engine.model.path, DDPM)
    assert torch.tensor(engine.step(batch_of(engine))["flow/mse"]).isfinite()


@pytest.mark.parametrize(
    ("objective", "path", "message"),
    [
        ({}, {"use": "linear", "laws": [{"untill": 0.5}, {}]}, r"generator\.path\.laws.*untill"),
        ({}, {"use": "linear", "sigma": 0}, r"generator\.path: sigma: 0"),
        ({}, {"use": "ddpm", "predicts": "velocity"}, r"generator\.path\.predicts: .*got 'velocity'"),
        ({"vlb": 1.0}, {"use": "linear"}, r"objectives\.flow: vlb: .*generator\.path: \{use: ddpm\}"),
        ({"weighting": "snr5"}, {"use": "linear"}, r"objectives\.flow\.weighting: .*got 'snr5'"),
    ],
)
def test_faults_are_told_with_the_stacks_key(
    objective: dict[str, Any], path: dict[str, Any], message: str
) -> None:
    with pytest.raises(StackFault, match=message):
        engine_of({"flow": objective}, views=VIEWS, generator=generator(**path))


def test_a_generator_without_a_path_is_told_what_to_write() -> None:
    with pytest.raises(StackFault, match=r"objectives\.flow: generator\.path: .*use: linear"):
        engine_of({"flow": {}}, views=VIEWS, generator={"use": "denoiser"})


def test_a_variance_that_nobody_learns_is_told() -> None:
    path = generator(use="ddpm")
    engine = engine_of({"flow": {"vlb": 1.0}}, views=VIEWS, generator=path)
    with pytest.raises(StackFault, match="gives no 'variance'"):
        engine.step(batch_of(engine))
