"""A network between two labels: the mean of its predictions for both, in shares.

A label has no place between itself and another, whatever table embeds it; predictions have. A mean of scores
is the score of the densities' weighted geometric mean, normalised.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Between(nn.Module):
    """A generator that also takes labels -1, -2, ...: -1 - k stands between the two labels of frame k.

    Args:
        network: of labels.
        first: label at share 0.
        second: label at share 1.
        shares: of the second label, one a frame.
    """

    shares: Tensor

    def __init__(self, network: Any, first: int, second: int, shares: Tensor) -> None:
        super().__init__()
        self.network, self.first, self.second = network, first, second
        self.register_buffer("shares", shares)

    def forward(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Tensor,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        """As ``vtp_plugins.protocols.Generator``; frames come before other rows, as conditions do before nulls."""
        frames = int((condition < 0).sum())
        if not frames:
            return self.network(x, u, condition, want, state)  # type: ignore[no-any-return]
        share = self.shares[-1 - condition[:frames]].to(x)
        level = u if u is None or len(u) == 1 else u[:frames]
        state = state or {}
        own, other = condition.clone(), torch.full_like(condition[:frames], self.second)
        own[:frames] = self.first
        near = self.network(x, u, own, want, state.get("first"))
        far = self.network(x[:frames], level, other, want, state.get("second"))
        out: dict[str, Any] = {}
        for name, value in near.items():
            if name == "state":
                out[name] = {"first": value, "second": far[name]}
                continue
            weight = share.view(-1, *[1] * (value.ndim - 1)).to(value)
            out[name] = torch.cat([torch.lerp(value[:frames], far[name], weight), value[frames:]])
        return out


def between(generator: Any, first: int, second: int, shares: Tensor) -> tuple[Any, Tensor]:
    """The generator of the frames between two labels, and the condition of each frame, (F,) int64."""
    device = generator.tokenizer.device
    other = copy.copy(generator)
    other.network = Between(generator.network, first, second, shares.to(device)).eval()
    if generator.weak is not None:
        other.weak = Between(generator.weak, first, second, shares.to(device)).eval()
    return other, -1 - torch.arange(len(shares), device=device)
