"""What a run's objectives read of the data, against what the dataset has."""

from __future__ import annotations

from collections.abc import Iterator

from vtp_core.build import Model
from vtp_core.errors import DataFault
from vtp_plugins.protocols import Dataset


def check_fields(model: Model, dataset: Dataset) -> None:
    """Every field that a view or objective reads must be one that the dataset has.

    Raises:
        DataFault: it lacks one; the message says what does without it.
    """
    for name, field, _ in _reads(model):
        if field not in dataset.fields | dataset.provides:
            raise DataFault(
                f"the dataset has no {field!r}, which objectives.{name} reads; "
                f"train without it: objectives.{name}=null"
            )


def hints(model: Model) -> dict[str, str]:
    """Field -> the override that does without it."""
    return {field: f"objectives.{name}=null" for name, field, raw in _reads(model) if raw}


def _reads(model: Model) -> Iterator[tuple[str, str, bool]]:
    """(objective, field, whether the field is no signal that everybody needs)."""
    for name, objective in model.objectives.items():
        for need in objective.needs.values():
            view = model.views.get(need.view)
            yield name, need.view if view is None else view.field, view is None or view.crops is None
