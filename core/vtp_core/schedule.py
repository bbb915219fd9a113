"""When an objective is active and what its terms weigh: pure functions of the step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vtp_core.errors import StackFault, suggestion
from vtp_core.options import Objective, Step, steps_of


def is_active(keys: Objective, step: int, steps: int, start: Step | None = None) -> bool:
    """Whether an objective takes part in a step: start <= step < stop, every so many steps."""
    first = steps_of(keys.start if start is None else start, steps)
    last = steps if keys.stop is None else steps_of(keys.stop, steps)
    return first <= step < last and (step - first) % keys.every == 0


def ramp(keys: Objective, step: int, steps: int) -> float:
    """Linear warm-up of the weight from its start, in (0, 1]."""
    warmup = steps_of(keys.warmup, steps)
    past = step - steps_of(keys.start, steps)
    return 1.0 if past >= warmup else (past + 1) / warmup


def scale(keys: Objective) -> float:
    """The weight of all terms together; weights written by term are in :func:`combined`."""
    return 1.0 if isinstance(keys.weight, dict) else keys.weight


def combined(name: str, keys: Objective, terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of an objective's terms, each by its own weight where the stack writes one.

    Raises:
        StackFault: a weight is written for a term that the objective does not have.
    """
    weights = keys.weight if isinstance(keys.weight, dict) else {}
    for term in weights:
        if term not in terms:
            raise StackFault(f"objectives.{name}.weight: no term {term!r}{suggestion(term, terms)}")
    total: Tensor | None = None
    for term, value in terms.items():
        part = value * weights[term] if term in weights else value
        total = part if total is None else total + part
    assert total is not None, "checked_terms refuses an empty dict"
    return total
