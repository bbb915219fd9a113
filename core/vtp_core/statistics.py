"""Latent statistics: what generators see latents through, computed once when a tokenizer is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtp_core.tokenizer import Tokenizer
    from vtp_plugins.protocols import Bench


@torch.no_grad()
def latent_statistics(tokenizer: Tokenizer, bench: Bench, limit: int = 10_000) -> dict[str, Tensor]:
    """Mean and std of the raw latent by channel over the trained split.

    Returns:
        ``mean`` and ``std`` (C,) float32, Bessel-corrected over images and places (specs/vtp.md 5.5), and
        ``count``, the images behind them.
    """
    total = torch.zeros(2, tokenizer.spec.channels, dtype=torch.float64)
    images = places = 0
    for batch in bench.images(bench.splits[0]):
        z = tokenizer.encode(batch[: limit - images]).double().cpu()
        flat = z.transpose(0, 1).flatten(1)  # (B, C, *grid) -> (C, B*N)
        total += torch.stack([flat.sum(1), flat.square().sum(1)])
        images, places = images + len(z), places + flat.shape[1]
        if images >= limit:
            break
    mean = total[0] / places
    variance = (total[1] - places * mean**2).clamp(min=0) / max(places - 1, 1)
    return {"mean": mean.float(), "std": variance.sqrt().float(), "count": torch.tensor(images)}
