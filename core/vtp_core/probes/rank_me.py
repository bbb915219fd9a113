"""RankMe (Garrido et al. 2023, arXiv 2210.02885): how many dimensions features really use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


class RankMe:
    """Effective rank of ``cls``, mean-pooled ``patches`` and mean-pooled ``latent``.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them the one that is trained on.
        limit: samples per split; None takes all.
    """

    fields: frozenset[str] = frozenset()

    def __init__(self, spec: Spec, *, splits: tuple[str, ...] = (), limit: int | None = 10_000) -> None:
        self.splits, self.limit = splits, limit

    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        out = []
        for split in self.splits or bench.splits[:1]:
            for name in ("cls", "patches", "latent"):
                x = bench.features(split)[name][: self.limit]
                protocol = (
                    f"exp of the entropy of singular values, not centred | {name} | at most {min(x.shape)}"
                )
                out.append(Reading(f"rank_me/{name}", split, effective_rank(x), len(x), protocol))
        return out


def effective_rank(x: Tensor) -> float:
    """Exponential of the entropy of the singular values of x (n, D), scaled to sum to 1."""
    values = torch.linalg.svdvals(x.double())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
