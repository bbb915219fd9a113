"""Velocity, noise, data and score at a noised latent: any one gives the others."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Meaning = Literal["velocity", "noise", "data", "score"]
Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
"""alpha, sigma, alpha', sigma' of x_u = alpha data + sigma noise; the derivatives are by u."""

MEANINGS = ("velocity", "noise", "data", "score")


def along(found: Coefficients, x: Tensor) -> Coefficients:
    """Coefficients (R,) or (1,) against the rows of x (R, ...): (R, 1, ...)."""
    alpha, sigma, d_alpha, d_sigma = (value.view(-1, *[1] * (x.ndim - 1)) for value in found)
    return alpha, sigma, d_alpha, d_sigma


def converted(value: Tensor, x: Tensor, at: Coefficients, given: str, to: str) -> Tensor:
    """A quantity at x from one meaning to another.

    With v = alpha' data + sigma' noise and D = alpha sigma' - alpha' sigma, data is (sigma' x - sigma v) / D
    and noise is (alpha v - alpha' x) / D; the score is -noise / sigma.

    Args:
        value: (R, C, *grid).
        x: the noised latent, of the same shape.
        at: coefficients, broadcastable to x.
        given: what ``value`` is.
        to: what is wanted.

    Raises:
        ValueError: a meaning is none of the four.
    """
    for meaning in (given, to):
        if meaning not in MEANINGS:
            raise ValueError(f"{meaning!r} is none of {', '.join(MEANINGS)}")
    if given == to:
        return value
    if to == "data":
        return _data(value, x, at, given)
    if to == "velocity":
        return _velocity(value, x, at, given)
    noise = _noise(value, x, at, given)
    return noise if to == "noise" else -noise / at[1]


def determinant(at: Coefficients) -> Tensor:
    """D = alpha sigma' - alpha' sigma, positive wherever the path moves; 1 on the straight one."""
    alpha, sigma, d_alpha, d_sigma = at
    return alpha * d_sigma - d_alpha * sigma


def _noise(value: Tensor, x: Tensor, at: Coefficients, given: str) -> Tensor:
    alpha, sigma, d_alpha, _ = at
    if given == "velocity":
        return (alpha * value - d_alpha * x) / determinant(at)
    if given == "data":
        return (x - alpha * value) / sigma
    return -sigma * value if given == "score" else value


def _data(value: Tensor, x: Tensor, at: Coefficients, given: str) -> Tensor:
    alpha, sigma, _, d_sigma = at
    if given == "velocity":
        return (d_sigma * x - sigma * value) / determinant(at)
    return (x - sigma * _noise(value, x, at, given)) / alpha


def _velocity(value: Tensor, x: Tensor, at: Coefficients, given: str) -> Tensor:
    alpha, sigma, d_alpha, d_sigma = at
    if given == "data":
        return (d_sigma * x - determinant(at) * value) / sigma
    return (d_alpha * x + determinant(at) * _noise(value, x, at, given)) / alpha
