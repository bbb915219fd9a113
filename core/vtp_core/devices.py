"""Where a run computes."""

from __future__ import annotations

import torch

from vtp_core.errors import StackFault


def device_of(name: str) -> torch.device:
    """``auto`` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise StackFault(
            f"train.device: {str(error).splitlines()[0]}; train.device=auto finds one"
        ) from error
    if device.type == "meta":
        raise StackFault("train.device: on 'meta' nothing is computed; train.device=auto finds a device")
    return torch.device(name)
