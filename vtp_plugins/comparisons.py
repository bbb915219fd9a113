"""What the test kit compares: state, generators, gradients."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
    terms: Sequence[Mapping[str, Tensor]],
    modules: Sequence[nn.Module],
    leaves: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of a mean loss at parameters, added up over processes, and at fake outputs.

    Args:
        terms: of every micro-batch of every process.
        modules: of every process; they have the same parameters.
        leaves: fake outputs.
    """
    leaves = leaves or {}
    total = torch.stack([torch.stack(list(one.values())).sum() for one in terms]).mean()
    names = [name for name, p in modules[0].named_parameters() if p.requires_grad]
    parameters = [dict(module.named_parameters())[name] for module in modules for name in names]
    if not total.requires_grad or not (parameters or leaves):
        return {}
    grads = torch.autograd.grad(
        total, [*parameters, *leaves.values()], allow_unused=True, materialize_grads=True
    )
    found = dict(zip(leaves, grads[len(parameters) :], strict=True))
    for index, name in enumerate(names):
        found[name] = torch.stack(grads[index : len(parameters) : len(names)]).sum(0)
    return found
