"""Which steps should make the state anew, found on a few templates (DDT, arXiv 2504.05741, section 3.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtp_core.samplers.field import Field
from vtp_core.samplers.reuse import Reuse, optimal, similarity
from vtp_plugins.clock import Clock
from vtp_plugins.protocols import Sampler


def states(
    sampler: Sampler, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock
) -> list[Tensor]:
    """The generator's state at every step of a sampling without reuse, conditioned rows: N times (R, T, D).

    Args:
        sampler: with a fixed number of steps N.
        field: of the generator.
        shape: of the templates, (R, C, *grid); the paper takes R = 8. All states lie in memory.
        condition: of the templates.
        clock: draws their noise; the same clock gives the same templates.

    Raises:
        ValueError: the sampler chooses its own steps.
    """
    watched = _Watched(field)
    sampler(watched, shape, condition, clock)
    return watched.states


def fitted(
    reuse: Reuse, sampler: Sampler, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock
) -> Reuse:
    """``optimal`` as the ``listed`` steps that it is for a generator; any other reuse as it is.

    Args:
        reuse: the stack's.
        sampler: as for :func:`states`, and so are the others.
        field: of the generator.
        shape: of the templates.
        condition: of the templates.
        clock: draws their noise.

    Raises:
        ValueError: the sampler chooses its own steps, or has fewer than ``keep``.
    """
    if reuse.use != "optimal" or reuse.keep is None:
        return reuse
    found = similarity(states(sampler, field, shape, condition, clock))
    return Reuse(use="listed", at=optimal(found, reuse.keep))


class _Watched(Field):
    """A field that makes its state anew at every step and notes it."""

    def __init__(self, field: Field) -> None:
        vars(self).update(vars(field.reusing(Reuse(keep=1))))
        self.states: list[Tensor] = []

    def start(self, steps: int) -> None:
        self.reuse = Reuse(keep=max(steps, 1))
        super().start(steps)

    def predict(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> dict[str, Tensor]:
        found = super().predict(x, u, condition, at)
        if self.step == len(self.states):
            self.states.append(self.state(len(x)).cpu())
        return found
