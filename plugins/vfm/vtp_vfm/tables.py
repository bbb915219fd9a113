"""Position tables of encoders: places of registers, which published files don't have, are zero in ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtp_vfm.layouts import TABLE, Tower

if TYPE_CHECKING:
    from vtp_vfm.reading import Found


def places_to_ours(found: Found) -> dict[str, Tensor]:
    """The tower's tensors with a table as timm has it: class token, registers, patches."""
    name, tensors = found.tower.positions, dict(found.encoder)
    table = tensors[name]
    if found.tower.flat:
        table = table[None]
    elif found.registers:
        empty = table.new_zeros(1, found.registers, table.shape[2])
        table = torch.cat([table[:, :1], empty, table[:, 1:]], dim=1)
    return tensors | {name: table}


def places_to_theirs(tensors: Mapping[str, Tensor], tower: Tower, registers: int) -> dict[str, Tensor]:
    """The inverse; places of registers that were trained since go into the registers."""
    found, table = dict(tensors), tensors[TABLE]
    if tower.flat:
        table = table[0]
    elif registers:
        places = table[:, 1 : 1 + registers]
        if not places.is_meta and places.any():
            found["reg_token"] = found["reg_token"] + places
        table = torch.cat([table[:, :1], table[:, 1 + registers :]], dim=1)
    return found | {TABLE: table}


def theirs_shape(ours: str, shape: tuple[int, ...], count: int, found: Found) -> tuple[int, ...]:
    """Shape of each of ``count`` tensors of theirs that are one of ours."""
    if ours == TABLE:
        return shape[1:] if found.tower.flat else (1, shape[1] - found.registers, shape[2])
    return (shape[0] // count, *shape[1:])
