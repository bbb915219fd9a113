"""What the test kit compares: state, generators, gradients."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vtp_plugins.fakes import FakeBatch
from vtp_plugins.objective import Objective


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters, of all buffers and of tensors that are plain attributes."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, child in module.named_modules():
        plain = {key: value for key, value in vars(child).items() if isinstance(value, Tensor)}
        found |= {f"{name}.{key}".lstrip("."): value for key, value in plain.items()}
    return {key: value.detach().clone() for key, value in found.items()}


def generators() -> tuple[Any, ...]:
    """States of the generators that everybody shares."""
    return torch.get_rng_state(), random.getstate(), repr(np.random.get_state())


def equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two states are the same."""
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def near(a: Tensor, b: Tensor) -> bool:
    """Equal up to what another order of float64 sums makes."""
    return torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10)


def gradients(
    terms: list[dict[str, Tensor]], objectives: list[Objective], batch: FakeBatch
) -> dict[str, Tensor]:
    """Gradients of the processes' mean loss at parameters and at fake outputs."""
    total = torch.stack([torch.stack(list(one.values())).sum() for one in terms]).mean()
    names = [name for name, p in objectives[0].named_parameters() if p.requires_grad]
    parameters = [dict(objective.named_parameters())[name] for objective in objectives for name in names]
    leaves = {" ".join(key): leaf for key, leaf in batch.leaves.items() if leaf.requires_grad}
    if not total.requires_grad:
        return {}
    grads = torch.autograd.grad(
        total, [*parameters, *leaves.values()], allow_unused=True, materialize_grads=True
    )
    found = dict(zip(leaves, grads[len(parameters) :], strict=True))
    for index, name in enumerate(names):
        found[name] = torch.stack(grads[index : len(parameters) : len(names)]).sum(0)
    return found
