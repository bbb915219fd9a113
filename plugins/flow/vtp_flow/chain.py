"""The discrete diffusion process of DDPM (arXiv 2006.11239) and of its respaced subsets (arXiv 2102.09672)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from vtp_core.nn.chunked import wide

LEAST = 1e-20  # of a variance, before its logarithm: that of the first step is 0


class Chain:
    """K of the T steps of a diffusion process, from the cleanest, with the tables of the process they make.

    Tables are float64 (K,); what is gathered from them is cast to the tensor it meets, float32 at least.
    ``index`` counts the K kept steps: an int, or int64 (R,). Latents are (R, C, *grid).

    Attributes:
        times: the kept timesteps of the whole process, int64, ascending; t = 0 is the cleanest.
        levels: noise level u = (t + 1) / T of each, what the generator is fed.
        betas: variance that the step adds.
        cumulative: product of 1 - beta up to the step, alpha-bar.
        previous: the same one step earlier; 1 before the first.
        posterior_variance: of q(x_{k-1} | x_k, x_0); 0 at the first step.
        posterior_log_variance: its logarithm, where the first step takes the second's.
        posterior_data: weight of x_0 in the posterior's mean.
        posterior_noised: weight of x_k in it.
    """

    def __init__(self, cumulative: Tensor, times: Tensor) -> None:
        self.times = times
        self.levels = (times + 1).double() / len(cumulative)
        self.cumulative = cumulative[times]
        self.previous = torch.cat([torch.ones(1, dtype=torch.float64), self.cumulative[:-1]])
        kept = self.cumulative / self.previous
        self.betas = 1 - kept
        self.posterior_variance = self.betas * (1 - self.previous) / (1 - self.cumulative)
        second = self.posterior_variance[min(1, len(times) - 1)]
        clipped = torch.cat([second[None], self.posterior_variance[1:]])
        self.posterior_log_variance = clipped.clamp_min(LEAST).log()
        self.posterior_data = self.betas * self.previous.sqrt() / (1 - self.cumulative)
        self.posterior_noised = (1 - self.previous) * kept.sqrt() / (1 - self.cumulative)

    def __len__(self) -> int:
        return len(self.times)

    def noised(self, data: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """x_k = sqrt(alpha-bar) data + sqrt(1 - alpha-bar) noise."""
        kept = self.cumulative
        return at(kept.sqrt(), index, data) * data + at((1 - kept).sqrt(), index, data) * noise

    def data(self, noised: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """x_0 from x_k and its noise."""
        scale, share = self.cumulative.rsqrt(), (1 / self.cumulative - 1).sqrt()
        return at(scale, index, noised) * noised - at(share, index, noised) * noise

    def noise(self, noised: Tensor, data: Tensor, index: int | Tensor) -> Tensor:
        """The noise in x_k, given x_0."""
        scale, share = self.cumulative.rsqrt(), (1 / self.cumulative - 1).sqrt()
        return (at(scale, index, noised) * noised - data) / at(share, index, noised)

    def posterior(self, data: Tensor, noised: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (R, C, *grid) and log-variance, broadcastable to it, of q(x_{k-1} | x_k, x_0)."""
        mean = at(self.posterior_data, index, noised) * data
        mean = mean + at(self.posterior_noised, index, noised) * noised
        return mean, at(self.posterior_log_variance, index, noised)

    def log_variance(self, variance: Tensor, index: int | Tensor) -> Tensor:
        """Log-variance from what a generator learns of it (arXiv 2102.09672, eq. 15).

        Args:
            variance: (R, C, *grid); -1 is the posterior's log-variance, 1 is log beta, linear between.
            index: of the step.
        """
        share = (wide(variance) + 1) / 2
        low, high = (at(table, index, variance) for table in (self.posterior_log_variance, self.betas.log()))
        return share * high + (1 - share) * low

    def reverse(
        self,
        noise: Tensor,
        noised: Tensor,
        index: int | Tensor,
        variance: Tensor | None = None,
        *,
        fixed: Literal["small", "large"] = "small",
        clip: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model's p(x_{k-1} | x_k): mean, log-variance, and the data it aims at.

        Args:
            noise: predicted, (R, C, *grid).
            noised: x_k.
            index: of the step.
            variance: as the generator learns it; None takes a fixed one.
            fixed: ``small`` is the posterior's variance, ``large`` is beta.
            clip: bound of the predicted data's magnitude; None leaves it, as for latents.

        Returns:
            The mean and the data, (R, C, *grid), and the log-variance, broadcastable to them. A sample is
            ``mean + exp(log_variance / 2) * n``, and the mean alone at index 0.
        """
        data = self.data(noised, noise, index)
        if clip is not None:
            data = data.clamp(-clip, clip)
        mean, least = self.posterior(data, noised, index)
        if variance is not None:
            return mean, self.log_variance(variance, index), data
        if fixed == "large":
            largest = torch.cat([self.posterior_log_variance[:1], self.betas[1:].log()])
            return mean, at(largest, index, noised), data
        return mean, least, data


def at(table: Tensor, index: int | Tensor, like: Tensor) -> Tensor:
    """Entries of a table against the rows of ``like``: () for an int, (R, 1, ...) for (R,); float32 at least."""
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    if isinstance(index, int):
        return table[index].to(like.device, dtype)
    picked = table.to(like.device)[index.to(like.device)].to(dtype)
    return picked.view(-1, *[1] * (like.ndim - 1))  # (R,) -> (R, 1, ...)


def spaced(timesteps: int, sections: Sequence[int]) -> Tensor:
    """Timesteps kept: equal sections of the process with so many steps each, ends included.

    A section of n steps keeps k of them at running sums of (n - 1) / (k - 1), rounded half to even; the
    first sections are the longer ones where the division leaves a rest.

    Raises:
        ValueError: a section is asked for more steps than it has, or for none.
    """
    size, rest = divmod(timesteps, len(sections))
    kept, start = [], 0
    for number, count in enumerate(sections):
        length = size + (number < rest)
        if not 1 <= count <= length:
            raise ValueError(f"steps: {count} of a section of {length} timesteps; take 1 to {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 0.0
        sums = accumulate([0.0] + [stride] * (count - 1))  # a product would round some halves otherwise
        kept += [start + round(place) for place in sums]
        start += length
    return torch.tensor(kept)


def strided(timesteps: int, steps: int) -> Tensor:
    """Timesteps kept: ``steps`` of them at the smallest whole stride that gives as many (arXiv 2010.02502).

    Raises:
        ValueError: no stride gives as many.
    """
    for stride in range(1, timesteps + 1):
        if len(range(0, timesteps, stride)) == steps:
            return torch.arange(0, timesteps, stride)
    raise ValueError(
        f"steps: no whole stride takes {steps} of {timesteps} timesteps; take a divisor, or spacing: even"
    )
