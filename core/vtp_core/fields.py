"""What a run's objectives read of the data, against what the dataset has."""

from __future__ import annotations

from collections.abc import Iterator

from vtp_core.build import Model
from vtp_core.data.loader import Loader
from vtp_core.engine import Engine
from vtp_core.errors import DataFault
from vtp_core.planner import DECODED, LATENT, family
from vtp_core.stack import Stack
from vtp_plugins.needs import Need
from vtp_plugins.protocols import Dataset


def check_fields(model: Model, dataset: Dataset) -> None:
    """Every field that a view or objective reads must be one that the dataset has.

    Raises:
        DataFault: it lacks one; the message says what does without it.
    """
    for name, field, _ in _reads(model, dataset.provides):
        if field not in dataset.fields | dataset.provides:
            raise DataFault(
                f"the dataset has no {field!r}, which objectives.{name} reads; "
                f"train without it: objectives.{name}=null"
            )


def hints(model: Model) -> dict[str, str]:
    """Field -> the override that does without it."""
    return {field: f"objectives.{name}=null" for name, field, raw in _reads(model) if raw}


def _reads(model: Model, provided: frozenset[str] = frozenset()) -> Iterator[tuple[str, str, bool]]:
    """(objective, field, whether the field is no signal that everybody needs), without what is provided."""
    for name, objective in model.objectives.items():
        for need in objective.needs.values():
            if all(_supplied(need, output, provided) for output in need.want):
                continue
            view = model.views.get(need.view)
            yield name, need.view if view is None else view.field, view is None or view.crops is None


def _supplied(need: Need, output: str, provided: frozenset[str]) -> bool:
    """Whether an output follows from what the dataset provides, without its view."""
    if need.source.startswith("teacher:"):
        return f"{need.source}/{output}" in provided
    behind = need.source == "generator" or family(output) in LATENT | DECODED
    return behind and output != "input" and "latent" in provided


def loader_of(engine: Engine, stack: Stack, dataset: Dataset, start: int) -> Loader:
    """This process's batches from step ``start`` on: the views and fields that some objective reads."""
    rows, keys, model = engine.layout.rows_by_view(), stack.data, engine.model
    views = {name: view for name, view in model.views.items() if name in rows}
    required = {view.field for view in views.values()} | (engine.layout.fields & rows.keys())
    return Loader(
        dataset, views, rows, batch_size=keys.batch_size, seed=stack.train.seed, rank=engine.rank,
        world=engine.world, workers=keys.workers, start=start, stop=stack.train.steps,
        required=frozenset(required), max_bad_fraction=keys.max_bad_fraction, hints=hints(model),
    )  # fmt: skip
