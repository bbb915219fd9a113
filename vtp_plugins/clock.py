"""What objectives, encoders, bottlenecks, decoders and generators know of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@runtime_checkable
class Clock(Protocol):
    """Progress, draws and collectives of one step.

    Draws are made for the whole global batch from a generator keyed by (seed, step, instance, name)
    and dealt to processes, so a row meets the same noise for any number of processes. The first axis
    of a draw's shape is rows.

    Attributes:
        step: optimizer steps already taken, from 0.
        share: progress of the run in [0, 1].
        world: number of processes.
        rank: index of this process.
    """

    @property
    def step(self) -> int: ...
    @property
    def share(self) -> float: ...
    @property
    def world(self) -> int: ...
    @property
    def rank(self) -> int: ...

    def positions(self, rows: int) -> Tensor:
        """Indices in the global batch of this process's first ``rows`` rows, (R,) int64."""
        ...

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal draws of ``shape``, whose first axis is rows; float32."""
        ...

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1) of ``shape``, whose first axis is rows; float32."""
        ...

    def rng(self, name: str) -> torch.Generator:
        """A CPU generator, equal on every process, for draws of any other form."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all processes along axis 0, (W*R, ...); differentiable."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """Sum over all processes; differentiable."""
        ...
