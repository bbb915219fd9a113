"""Captions of a stack's first step, where its data tells them without a picture: a text tower keeps as much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vtp_core.blueprint import Blueprint
from vtp_core.build import Model, spec_of
from vtp_core.evaluation import dataset_component
from vtp_core.inputs import Inputs
from vtp_plugins.errors import Fault
from vtp_plugins.protocols import Dataset

LONG = "a " * 4096
"""A caption that fills any context."""
MOST = 1024  # captions that are asked for


def captions_of(plans: Blueprint, dataset: Dataset | None = None) -> list[str]:
    """Captions of the first step of all processes; none where the data does not tell, or is not there.

    Args:
        plans: of the stack.
        dataset: of the stack, if it is there already.
    """
    stack = plans.stack
    try:
        if dataset is None and hasattr(dataset_component(stack).cls, "texts"):
            dataset = dataset_component(stack).build(spec_of(plans))
    except Fault:
        return []
    texts: Any = getattr(dataset, "texts", None)
    if dataset is None or texts is None:
        return []
    first = dataset.order(stack.train.seed, 0)[: min(stack.data.batch_size, MOST)]
    return [text for text in texts(first) if text is not None]


def longest(made: Iterable[Tensor]) -> Tensor:
    """The caption with the most ids, of (L,) each, zero after their ends."""
    return max(made, key=lambda ids: int(ids.count_nonzero()))


def lengths(model: Model, inputs: Inputs) -> dict[str, tuple[int, int]]:
    """View of texts -> ids of a caption that are counted, and of the context."""
    views = {name: ids for name, ids in inputs.views.items() if model.views[name].field == "text"}
    return {name: (int(ids[0].count_nonzero()), ids.shape[-1]) for name, ids in views.items()}
