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


def weighted(name: str, keys: Objective, terms: Mapping[str, Tensor]) -> Tensor:
    """Sum of an objective's terms by its weights, before warm-up and balance.

    Raises:
        StackFault: a weight is written for a term that the objective does not have.
    """
    if isinstance(keys.weight, dict):
        for term in keys.weight:
            if term not in terms:
                raise StackFault(f"objectives.{name}.weight: no term {term!r}{suggestion(term, terms)}")
        parts = [keys.weight.get(term, 1.0) * value for term, value in terms.items()]
        scale = 1.0
    else:
        parts, scale = list(terms.values()), keys.weight
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * scale
