"""Mean and variance of latents at every position, which RAE's generators see them through."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def moments(batches: Iterable[Tensor], momentum: float = 0.1) -> dict[str, Tensor]:
    """Running moments, as RAE computes them: each batch moves both by ``momentum`` from mean 0 and variance 1.

    What it gives is a statistics file of ``vtp convert --statistics``, once saved.

    Args:
        batches: raw latents (B, C, h, w).
        momentum: share of the newest batch. The last ones count most; 0.9 ** n of the start remains after n.

    Returns:
        ``mean`` and ``var``, (C, h, w); the variance is that of the population.

    Raises:
        ValueError: there are no batches.
    """
    found: dict[str, Tensor] = {}
    for z in batches:
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if not found:
            found = {"mean": torch.zeros_like(z[0]), "var": torch.ones_like(z[0])}
        new = {"mean": z.mean(0), "var": z.var(0, unbiased=False)}
        found = {name: (1 - momentum) * value + momentum * new[name] for name, value in found.items()}
    if not found:
        raise ValueError("batches: there are none")
    return found
