"""The variational bound of a discrete diffusion, which trains a learned variance (arXiv 2102.09672, eq. 4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtp_flow.chain import Chain

HALF_BIN = 1 / 255  # of 256 values over [-1, 1]
LEAST = 1e-12  # probability


def bits(
    chain: Chain, data: Tensor, noised: Tensor, noise: Tensor, variance: Tensor, index: Tensor
) -> Tensor:
    """One step's term of the bound, in bits per dimension, (R,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and the negative log-likelihood of the data, taken for
    256 values in [-1, 1], at t = 0.

    Args:
        chain: the process.
        data: x_0, (R, C, *grid).
        noised: x_t.
        noise: predicted; detach it where the term is to train the variance alone.
        variance: as the generator learns it.
        index: t, (R,) int64.
    """
    aim, aimed = chain.posterior(data, noised, index)
    mean, log_variance, _ = chain.reverse(noise, noised, index, variance)
    divergence = _divergence(aim, aimed, mean, log_variance).flatten(1).mean(1)  # (R, C, *grid) -> (R,)
    surprise = -_log_likelihood(data, mean, log_variance).flatten(1).mean(1)
    return torch.where(index == 0, surprise, divergence) / math.log(2)


def _divergence(mean: Tensor, log_variance: Tensor, other: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of one diagonal normal from another, by element, in nats."""
    gap = log_variance - other_log_variance
    return 0.5 * (gap.exp() - 1 - gap + (mean - other) ** 2 * (-other_log_variance).exp())


def _log_likelihood(data: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of the bin around each value; the outermost bins are open, in nats."""
    precision = (-0.5 * log_variance).exp()
    upto = _cumulative((data + HALF_BIN - mean) * precision)
    before = _cumulative((data - HALF_BIN - mean) * precision)
    share = torch.where(data < -0.999, upto, torch.where(data > 0.999, 1 - before, upto - before))
    return share.clamp_min(LEAST).log()


def _cumulative(x: Tensor) -> Tensor:
    """The normal distribution function by Page's tanh, which DDPM-type code takes for the exact one."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
