"""A batch without values in the shapes that a step reads; captions are as long as those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_core.build import Model
from vtp_core.dryrun.captions import LONG, longest
from vtp_core.forwards import Inputs
from vtp_core.layout import Layout
from vtp_plugins.protocols import Dataset


def inputs_of(
    model: Model, layout: Layout, dataset: Dataset | None = None, texts: Sequence[str] = ()
) -> Inputs:
    """This process's batch: views tell their shapes on an empty sample, what a dataset provides on its first.

    Args:
        model: built, on any device.
        layout: tells the rows.
        dataset: asked for what it provides in place of forwards.
        texts: captions, of which the longest is taken for all; without any they fill their context.
    """
    rows, views = layout.rows_by_view(), {}
    for name, view in model.views.items():
        if name not in rows:
            continue
        if view.field == "text":  # how long the longest is decides what is computed
            made = longest(view(text) for text in texts or (LONG,))
            views[name] = made.expand(rows[name], *made.shape).contiguous()
        else:
            blank = torch.zeros(model.spec.signal_channels, *model.spec.size, dtype=torch.uint8)
            views[name] = _empty(view(blank), rows[name])
    sample = dataset[0] if dataset is not None and layout.provided else {}
    fields: dict[str, Any] = {}
    for name in layout.fields:
        value = sample.get(name)
        if name == model.condition and model.spec.condition == "embedding":
            value = torch.empty(model.spec.condition_width)
        whole = value if isinstance(value, Tensor) else torch.zeros((), dtype=torch.long)
        fields[name] = _empty(whole, rows.get(name, 0))
    return Inputs(views, fields)


def _empty(sample: Tensor, rows: int) -> Tensor:
    return torch.empty(rows, *sample.shape, dtype=sample.dtype, device="meta")
