"""Distances of aligned vectors, and of the matrices of their similarities (arXiv 2410.06940, 2501.01423)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from vtp_plugins.clock import Clock

Distance = Literal["cosine", "neg_cosine", "mse", "l1", "smooth_l1"]
Scope = Literal["token", "pairs", "batch"]


class Term(BaseModel):
    """One distance: of a token from its own teacher's, or of similarities between tokens from the teacher's.

    Args:
        distance: ``cosine`` is 1 - cos and ``neg_cosine`` -cos; ``mse``, ``l1`` and ``smooth_l1`` are of
            differences, averaged over channels.
        margin: what a distance may be without being penalised: the mean of ReLU(distance - margin).
        scope: ``token`` against token; ``pairs``: the cosine matrix of one signal's tokens against the
            teacher's; ``batch``: that of all tokens of the whole batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    distance: Distance = "cosine"
    margin: float = Field(0.0, ge=0)
    scope: Scope = "token"

    def check(self) -> None:
        """Refuse what means nothing.

        Raises:
            ValueError: a margin under -cos, or a cosine of cosines.
        """
        if self.distance == "neg_cosine" and self.margin:
            raise ValueError("margin: distance neg_cosine has none; use distance: cosine, which is 1 - cos")
        if self.scope != "token" and "cosine" in self.distance:
            raise ValueError(
                f"scope: {self.scope} compares matrices of cosines; set distance to l1, mse or smooth_l1"
            )

    def __call__(self, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
        """Mean distance, a scalar, of x (B, N, C) from y (B, N, C'); C' is C where the scope is ``token``."""
        if self.scope == "token":
            off = self._between(x, y)
        elif self.scope == "pairs":
            off = self._entries(_cosines(x, x), _cosines(y, y))  # (B, N, N)
        else:
            x, y = x.flatten(0, 1), y.flatten(0, 1)  # (B, N, C) -> (B N, C)
            off = self._entries(_cosines(x, clock.gather(x)), _cosines(y, clock.gather(y)))  # (B N, W B N)
        return F.relu(off - self.margin).mean() if self.margin else off.mean()

    def _between(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of every token from its own, (B, N)."""
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(x, y, dim=-1)
        if self.distance == "neg_cosine":
            return -F.cosine_similarity(x, y, dim=-1)
        return self._entries(x, y).mean(-1)  # (B, N, C) -> (B, N)

    def _entries(self, x: Tensor, y: Tensor) -> Tensor:
        if self.distance == "mse":
            return (x - y).square()
        if self.distance == "l1":
            return (x - y).abs()
        return F.smooth_l1_loss(x, y, reduction="none")


def _cosines(x: Tensor, others: Tensor) -> Tensor:
    """Cosine of every token with every other, (..., N, M)."""
    return F.normalize(x, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)
