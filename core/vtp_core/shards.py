"""Tensors that are dealt over the processes of a run: FSDP2 gives each of them some rows of every weight.

Nothing here imports DTensor: runs that deal nothing start without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp_core.run.saved import rows_of


def is_shard(tensor: Any) -> bool:
    """Whether this process holds some rows of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the memory where they lie; a tensor that is not dealt, as it is."""
    if not is_shard(tensor):
        return tensor
    held: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return held


def span(shard: Any) -> tuple[int, int]:
    """First and last row, exclusive, that this process holds; both are the number of rows where it holds none."""
    rows, world = shard.shape[0], shard.device_mesh.size()
    each = -(-rows // world)
    first = min(shard.device_mesh.get_local_rank() * each, rows)
    return first, min(first + each, rows)


def alike(shard: Any, rows: Tensor) -> Tensor:
    """This process's ``rows`` as a tensor that is dealt as ``shard`` is."""
    made: Tensor = type(shard).from_local(
        rows, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )
    return made


def whole(tensor: Tensor) -> Tensor:
    """All rows; every process must call this."""
    if not is_shard(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def dealt(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Whole tensors as a module holds them, each by :func:`held`; as they are where the module holds all rows.

    Args:
        own: the module's tensors.
        tensors: by the same names, or others, which the module will refuse.
    """
    if not any(map(is_shard, own.values())):
        return tensors
    return {name: held(own[name], tensors, name) if name in own else tensors[name] for name in tensors}


def held(own: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A whole tensor as this process holds ``own``, of which it may have some rows: those, read without the others.

    A tensor of another shape stays whole, for whoever takes it to refuse.
    """
    if is_shard(own):
        rows = rows_of(tensors, name, *span(own), shape=own.shape)
        if rows is not None:
            return alike(own, rows.to(own.device, own.dtype, copy=True))
    return tensors[name]
