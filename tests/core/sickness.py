"""Steps that are not finite in one of two processes; the pool finds these functions by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rig import batch_of, engine_of, weights
from torch import Tensor
from two import OBJECTIVES, SECTIONS

from vtp_core.engine import Engine
from vtp_core.errors import NonFinite
from vtp_core.shards import local

Terms = dict[str, Tensor]


def loss(value: float) -> Callable[[Any, Terms], Terms]:
    """One term is this number."""
    return lambda got, terms: {**terms, next(iter(terms)): next(iter(terms.values())) * 0 + value}


def gradient(got: Any, terms: Terms) -> Terms:
    """One element of the gradient is no number, and the loss is as it was."""
    tensors = [
        v for slot in got.values() for v in slot.values.values() if torch.is_tensor(v) and v.requires_grad
    ]
    element = tensors[0].flatten()[0] * 0
    name, value = next(iter(terms.items()))
    return {**terms, name: value + element.sqrt()}


WAYS: dict[str, Callable[[Any, Terms], Terms]] = {
    "nan": loss(torch.nan),
    "inf": loss(torch.inf),
    "-inf": loss(-torch.inf),
    "gradient": gradient,
}


def fall_ill(engine: Engine, name: str, way: str, rank: int) -> None:
    """From here on an objective is not finite in one process."""
    objective: Any = engine.model.objectives[name]
    healthy = objective.forward
    if dist.get_rank() == rank:
        objective.forward = lambda got, clock: WAYS[way](got, healthy(got, clock))


def caught(engine: Engine, step: int) -> tuple[str, bool]:
    """What the step says, and whether everything is as it was before, bit by bit."""
    before, done = weights(engine), engine.steps_done
    try:
        engine.step(batch_of(engine, step))
    except NonFinite as fault:
        after = weights(engine)
        same = all(torch.equal(local(before[key]), local(after[key])) for key in before)
        same = same and before.keys() == after.keys()
        settled = not any(objective.pending for objective in engine.model.objectives.values())
        return str(fault), same and settled and engine.steps_done == done
    return "", False


def each_objective(way: str, parallel: str) -> dict[str, tuple[str, bool]]:
    """One objective after the other, in process 1."""
    found = {}
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "parallel": parallel}}
    for name in OBJECTIVES:
        engine = engine_of(OBJECTIVES, batch=16, **sections)
        fall_ill(engine, name, way, rank=1)
        found[name] = caught(engine, 0)
    return found


def random_steps(count: int) -> list[tuple[str, str, tuple[str, bool]]]:
    """At random steps of one run each."""
    draws, found = random.Random(0), []
    for _ in range(count):
        engine = engine_of(OBJECTIVES, batch=16, **SECTIONS)
        name, way, rank = draws.choice(list(OBJECTIVES)), draws.choice(list(WAYS)), draws.randrange(2)
        steps = draws.randrange(0, 6, 2)  # one of the objectives takes part in every other step
        for step in range(steps):
            engine.step(batch_of(engine, step))
        fall_ill(engine, name, way, rank)
        found.append((name, f"process {rank} of 2", caught(engine, steps)))
    return found


def dumped(folder: str, ids: Sequence[int]) -> str:
    """A sick picture in process 1, whose rows all processes read together: what is said, and what is written."""
    engine = engine_of({"contrast": {"rows": 0.5}, "rebuild": {}}, batch=16, **SECTIONS)
    engine.run_path = Path(folder)
    engine.sample_name = lambda index: f"picture {index}"
    inputs = batch_of(engine)
    inputs.ids = torch.tensor(ids)[dist.get_rank() :: 2]
    if dist.get_rank() == 1:
        inputs.views["global"][1] = torch.nan
    try:
        engine.step(inputs)
    except NonFinite as fault:
        return str(fault)
    return ""
