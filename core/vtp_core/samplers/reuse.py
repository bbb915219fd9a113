"""Steps at which a generator's encoder is run again, its state being reused between (DDT, arXiv 2504.05741)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from vtp_plugins.errors import StackFault


class Reuse(BaseModel):
    """``sampler.reuse``: at which steps the state is made anew; step 0 is always one of them.

    Attributes:
        use: ``uniform`` spreads the steps evenly; ``optimal`` takes the best ones, which
            :func:`vtp_core.samplers.templates.fitted` finds and lists; ``listed`` takes ``at`` as it is.
        keep: how many steps make the state anew, K of ``uniform`` and ``optimal``.
        at: the steps of ``listed``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: Literal["uniform", "optimal", "listed"] = "uniform"
    keep: int | None = Field(None, gt=0)
    at: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Reuse:
        if self.use == "listed" and (self.keep is not None or 0 not in self.at or min(self.at) < 0):
            raise ValueError("listed takes 'at', steps from 0 that contain 0, and no 'keep'")
        if self.use != "listed" and (self.keep is None or self.at):
            raise ValueError(f"{self.use} takes 'keep', how many steps make the state anew, and no 'at'")
        return self

    def refreshed(self, steps: int) -> frozenset[int]:
        """The steps, of so many, that make the state anew.

        Raises:
            StackFault: ``steps`` is 0 (the sampler chooses its own) or fewer than are asked for, or the
                steps of ``optimal`` have not been found yet.
        """
        if steps == 0:
            raise StackFault(
                "sampler.reuse: this sampler chooses its own steps; take one with 'steps', or no reuse"
            )
        if self.use == "optimal":
            raise StackFault(
                "sampler.reuse: the steps of 'optimal' are found by vtp_core.samplers.templates.fitted first"
            )
        if (self.keep or max(self.at, default=0) + 1) > steps:
            raise StackFault(
                f"sampler.reuse: {self.keep or self.at} is more than the sampler's {steps} steps"
            )
        return frozenset(self.at or uniform(steps, self.keep or 1))


def uniform(steps: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``steps`` steps at equal distance, the first being 0."""
    return tuple(-(-index * steps // keep) for index in range(keep))


def optimal(similarity: Tensor, keep: int) -> tuple[int, ...]:
    """The ``keep`` steps with the least total error, by dynamic programming (arXiv 2504.05741, section 3.4).

    A step that reuses the state of an earlier step r errs by one less their similarity, so the steps
    r .. s - 1 of one segment cost the sum over l of 1 - S[r, l]. The first segment begins at step 0.

    Args:
        similarity: S, (N, N), of the states of N steps.
        keep: segments, 1 to N.

    Raises:
        ValueError: ``keep`` is not among 1 to N.
    """
    steps = len(similarity)
    if not 1 <= keep <= steps:
        raise ValueError(f"reuse.keep: {keep} of {steps} steps; take 1 to {steps}")
    error = (1 - similarity.double().cpu()).triu()
    sums = F.pad(error.cumsum(1), (1, 0))  # (N, N) -> (N, N + 1): a segment from r to s - 1 costs sums[r, s]
    never = torch.ones(steps, steps + 1).tril().bool()  # s <= r is no segment
    sums = sums.masked_fill(never, torch.inf)
    best, before = sums[0], []
    for _ in range(keep - 1):
        found = (best[:steps, None] + sums).min(0)  # over the last segment's first step
        best = found.values
        before.append(found.indices)
    chosen, end = [], steps
    for starts in reversed(before):
        end = int(starts[end])
        chosen.append(end)
    return (0, *reversed(chosen))


def similarity(states: Sequence[Tensor]) -> Tensor:
    """Mean over rows and tokens of the cosine of every two states, (N, N).

    Args:
        states: (R, T, D) at each of N steps.
    """
    units = torch.stack([F.normalize(state.float(), dim=-1).flatten() for state in states])  # (N, R T D)
    return units @ units.T / states[0].shape[:-1].numel()
