"""From a stack written as a dict to an engine and a batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core.build import Model, blueprint, build
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_core.stack import Stack, check_stack
from vtp_plugins.needs import Outputs
from vtp_plugins.registry import Registry

ROOT: dict[str, Any] = {
    "modality": "plane",
    "encoder": {"use": "patches"},
    "bottleneck": {"use": "linear", "channels": 4},
    "decoder": {"use": "unpatch"},
    "train": {
        "precision": "float64", "steps": 20, "max_grad_norm": None,
        "optim": {"lr": 0.01, "warmup": 0, "schedule": "constant"},
    },
}  # fmt: skip


@functools.cache
def registry() -> Registry:
    """What is installed, and the toys."""
    return Registry([Path(__file__).with_name("toy_objectives.py")])


def stack_of(objectives: Mapping[str, Any], **sections: Any) -> Stack:
    """A toy stack; sections replace, `train` merges."""
    train = {**ROOT["train"], **sections.pop("train", {})}
    config = {**ROOT, "objectives": dict(objectives), **sections, "train": train}
    return check_stack("toy", {key: node for key, node in config.items() if node is not None}, registry())


def engine_of(
    objectives: Mapping[str, Any],
    batch: int = 8,
    provided: frozenset[str] = frozenset(),
    hooks: Any = None,
    **sections: Any,
) -> Engine:
    stack = stack_of(objectives, **sections)
    return Engine(built(stack), stack.train, batch, hooks=hooks, provided=provided)


def built(stack: Stack) -> Model:
    return build(blueprint(stack), classes=3)


def batch_of(engine: Engine, seed: int = 0) -> Inputs:
    """The step's batch of this process: rows by view as the layout asks, dealt from a global batch."""
    torch.manual_seed(seed)
    spec, layout = engine.model.spec, engine.layout
    world, rank = engine.world, engine.rank
    views: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, rows in sorted(layout.rows_by_view().items()):
        shape: tuple[int, ...] = (spec.signal_channels, *spec.size)
        if name in engine.model.views:
            crops = engine.model.views[name].crops
            views[name] = dealt(
                torch.randn(layout.batch_size, *([crops] if crops else []), *shape), world, rank
            )[:rows]
        elif name == "latent":
            fields[name] = dealt(torch.randn(layout.batch_size, spec.channels, *spec.grid), world, rank)[
                :rows
            ]
        else:
            fields[name] = dealt(torch.randint(spec.classes, (layout.batch_size,)), world, rank)[:rows]
    return Inputs({name: view.double() for name, view in views.items()}, fields)


def dealt(whole: Tensor, world: int, rank: int) -> Tensor:
    """Global row i belongs to process i mod W."""
    return whole[rank::world]


def run(engine: Engine, steps: int, first: int = 0) -> list[dict[str, float]]:
    return [engine.step(batch_of(engine, seed=first + step)) for step in range(steps)]


def weights(engine: Engine) -> dict[str, Tensor]:
    """A copy of everything that a checkpoint would hold."""
    return {
        f"{part}/{key}": value.clone()
        for part, tensors in engine.state().items()
        for key, value in tensors.items()
    }


def gradients(engine: Engine, inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients by parameter, and the row, of one step, as the optimizers would see them."""
    caught: dict[str, Tensor] = {}
    step = engine.optimizers.step

    def catch(index: int) -> None:
        for owner, module in engine.model.modules().items():
            caught.update(
                {f"{owner}.{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            )
        step(index)

    engine.optimizers.step = catch  # type: ignore[method-assign]
    row = engine.step(inputs)
    engine.optimizers.step = step  # type: ignore[method-assign]
    return caught, row


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal keys and values."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def seen_by(engine: Any, name: str) -> list[dict[str, Outputs]]:
    """What the objective is handed, evaluation by evaluation."""
    found: list[dict[str, Outputs]] = []
    engine.model.objectives[name].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return found


def grid(tokens: Tensor) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (2, 2))


def owners(found: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[0] for key, grad in found.items() if grad.abs().sum() > 0}
