"""Modules that few people write, trained with weights whole or dealt, in one of several processes or alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from dealt import Found, whole
from torch import Tensor, nn

from benchmarks.distributed import BASE, _move, batch_of
from benchmarks.distributed_cases import cases
from vtp_core.build import Model, blueprint, build
from vtp_core.engine import Engine
from vtp_core.errors import Fault
from vtp_core.run import checkpoint
from vtp_core.stack import check_stack
from vtp_plugins.registry import Registry


def second() -> bool:
    return dist.is_initialized() and dist.get_rank() == 1


def branching(model: Model) -> None:
    """An objective with three layers: one for all, one for the second process alone, one for nobody."""
    objective: Any = model.objectives["koleo"]
    for name in ("used", "sometimes", "never"):
        setattr(objective, name, nn.Linear(16, 16))
    told = type(objective).forward

    def forward(self: Any, got: Any, clock: Any) -> dict[str, Tensor]:
        terms = told(self, got, clock)
        x = torch.ones(2, 16, dtype=torch.float64)
        more = self.used(x).mean() + (self.sometimes(x).mean() if second() else 0.0)
        return {name: term + more for name, term in terms.items()}

    objective.forward = MethodType(forward, objective)


def constant(model: Model) -> None:
    """An objective that has nothing to learn from in the second process."""
    objective: Any = model.objectives["kl"]
    told = type(objective).forward

    def forward(self: Any, got: Any, clock: Any) -> dict[str, Tensor]:
        terms = told(self, got, clock)
        return {name: torch.zeros_like(term) if second() else term for name, term in terms.items()}

    objective.forward = MethodType(forward, objective)


def tied_layers(model: Model) -> None:
    """Two blocks share a layer."""
    first, other = model.encoder.blocks[:2]
    other.mlp = first.mlp


def tied_weights(model: Model) -> None:
    """Two blocks share a weight."""
    first, other = model.decoder.blocks[:2]
    other.attn.qkv.weight = first.attn.qkv.weight


def registers(model: Model) -> None:
    """A weight that holds nothing."""
    model.encoder.registers = nn.Parameter(torch.zeros(1, 0, 16))


def within(model: Model) -> None:
    """A layer of a block is called past the block."""
    encoder = model.encoder
    told = type(encoder).forward

    def forward(self: Any, x: Tensor, **keys: Any) -> dict[str, Tensor]:
        more = self.blocks[0].attn.qkv(torch.ones(1, 1, 16, dtype=x.dtype)).mean()
        return {name: value + more for name, value in told(self, x, **keys).items()}

    encoder.forward = MethodType(forward, encoder)


CHANGES: dict[str, Callable[[Model], None]] = {
    f.__name__: f for f in (branching, constant, tied_layers, tied_weights, registers, within)
}


def built(name: str, change: str, parallel: str) -> Engine:
    """The engine of a stack of :mod:`benchmarks.distributed_cases`, changed."""
    case = cases()[name]
    train = {**BASE["train"], "parallel": parallel, "precision": "float64"}
    stack = check_stack(name, {**BASE, **case.sections, "train": train}, Registry())
    model = build(blueprint(stack), classes=3)
    _move(model.modules())
    torch.manual_seed(0)
    CHANGES[change](model)
    return Engine(model, stack.train, case.batch)


def trained(name: str, change: str, parallel: str) -> Found:
    engine = built(name, change, parallel)
    rows = [engine.step(batch_of(engine, step)) for step in range(3)]
    return {"rows": rows, "state": whole(engine)}


def refused(name: str, change: str) -> str:
    """What a step says that cannot be taken with dealt weights."""
    engine = built(name, change, "fsdp2")
    try:
        engine.step(batch_of(engine, 0))
    except Fault as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""


def reloaded(change: str, folder: str) -> bool:
    """Whether what is saved is what is loaded."""
    engine = built("kl: sum", change, "fsdp2")
    engine.step(batch_of(engine, 0))
    before = whole(engine)
    checkpoint.save(Path(folder), 1, engine.state(), {})
    path = checkpoint.latest(Path(folder))
    assert path is not None
    engine.step(batch_of(engine, 1))
    engine.load(checkpoint.opened(path), 1)
    after = whole(engine)
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
