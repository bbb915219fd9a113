"""Values that training does not leave behind: not finite, or all zero where a new module's are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vtp_plugins.importing import refuse

Tensors = Mapping[str, Tensor]


def not_finite(tensors: Tensors) -> dict[str, str]:
    """Tensors with NaN or infinity -> what they hold."""
    found = {}
    for name, (low, high) in _bounds(tensors).items():
        if not (low > -torch.inf and high < torch.inf):
            found[name] = "NaN" if low != low else "infinity"
    return found


def zeros(tensors: Tensors) -> dict[str, str]:
    """Tensors of nothing but zeros -> their shape. Biases are left out: in many a trained network they stay so."""
    return {
        name: f"{tuple(tensors[name].shape)}"
        for name, bounds in _bounds(tensors).items()
        if bounds == (0, 0) and not name.endswith("bias")
    }


def check_values(tensors: Tensors, fresh: Callable[[], Tensors]) -> None:
    """Refuse a state dict with values that no training leaves behind.

    Args:
        tensors: of a network.
        fresh: of the same network as it is drawn, by the same names; only called where something is zero. What is
            zero there may be zero here: the file was perhaps never trained.

    Raises:
        Mismatch: a tensor is not finite, or zero where a new one is not.
    """
    found = zeros(tensors)
    if found:
        new = fresh()
        young = zeros({name: new[name] for name in found if name in new})
        found = {name: shape for name, shape in found.items() if name not in young}
    refuse({"not finite": not_finite(tensors), "all zero": found})


def _bounds(tensors: Tensors) -> dict[str, tuple[float, float]]:
    """Least and greatest value; NaN where there is one. Nothing of a tensor's size is made."""
    found = {}
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and not value.is_meta:
            low, high = torch.aminmax(value)
            found[name] = (float(low), float(high))
    return found
