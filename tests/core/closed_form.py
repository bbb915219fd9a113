"""A straight path and a generator whose data are normal, so that every field is known; clocks that note draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.clock import StepClock

CLASSES = 3


class Straight:
    """x_u = (1 - u) data + u noise."""

    predicts = "velocity"

    def draw(self, name: str, rows: int, clock: Any) -> Tensor:
        return clock.uniform(name, rows)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - u, u, -torch.ones_like(u), torch.ones_like(u)

    def mix(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return (1 - u) * x + u * noise

    def target(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        return noise - x

    def convert(self, value: Tensor, x: Tensor, u: Tensor, to: str, given: str | None = None) -> Tensor:
        assert given in {None, "velocity"}
        u = u.view(-1, *[1] * (x.ndim - 1))
        noise = x + (1 - u) * value
        return {"velocity": value, "noise": noise, "data": x - u * value, "score": -noise / u}[to]


class Noisy(Straight):
    """A path without velocities."""

    predicts = "noise"

    def convert(self, value: Tensor, x: Tensor, u: Tensor, to: str, given: str | None = None) -> Tensor:
        if to == "velocity":
            raise ValueError("path: noisy has no velocities; take another")
        return value


@dataclass
class Normal:
    """The exact velocity of data N(means[class], spread^2); the null class has mean 0. Notes its calls."""

    means: tuple[float, ...] = (-1.0, 0.5, 2.0, 0.0)
    spread: float = 0.5
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        u: Tensor,
        condition: Any,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        self.calls.append({"x": x, "u": float(u), "condition": condition, "want": want, "state": state})
        assert u.shape == (1,)
        mean = torch.tensor(self.means, dtype=x.dtype)[condition].view(-1, *[1] * (x.ndim - 1))
        given = x - (1 - u) * mean
        variance = (1 - u) ** 2 * self.spread**2 + u**2
        noise, data = u * given / variance, mean + (1 - u) * self.spread**2 * given / variance
        return {"prediction": noise - data}

    @property
    def rows(self) -> list[int]:
        return [len(call["x"]) for call in self.calls]


class Split(nn.Module):
    """A generator with an encoder, whose state (R, T, D) is reused: class and level enter through it alone."""

    def __init__(self, channels: int = 4, classes: int = CLASSES, tokens: int = 2) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = nn.Embedding(classes + 1, tokens * 6)
        self.encoder = nn.Linear(channels, tokens * 6)
        self.decoder = nn.Linear(channels, channels)
        self.head = nn.Linear(tokens * 6, channels)
        self.tokens, self.encoded = tokens, 0

    def forward(
        self,
        x: Tensor,
        u: Tensor,
        condition: Tensor,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        if state is None:
            self.encoded += 1
            state = torch.tanh(self.encoder(x.mean((2, 3))) + self.table(condition) + 3 * u)
            state = state.view(len(x), self.tokens, -1)  # (R, T D) -> (R, T, D)
        moved = self.decoder(x.movedim(1, -1)) + self.head(state.flatten(1))[:, None, None]
        found = {"prediction": moved.movedim(-1, 1), "state": state}
        return {name: found[name] for name in want}


@dataclass(frozen=True)
class Given(StepClock):
    """Draws are those given by name; those that are not are made."""

    draws: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, *shape: int) -> Tensor:
        if name not in self.draws:
            return StepClock.normal(self, name, *shape)
        assert self.draws[name].shape == shape
        return self.draws[name]


def null(condition: Tensor) -> Tensor:
    """The null class of every row."""
    return torch.full_like(condition, CLASSES)
