"""Full precision inside autocast, where a loss needs it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast on the device of ``x``; the meta device, where plans are counted, knows none."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
