"""Standing in for the other processes of a run: a group whose collectives are asked for and never made."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module

import torch.distributed as dist

from vtp_core.errors import StackFault


@contextlib.contextmanager
def processes(world: int) -> Iterator[None]:
    """A world of so many processes, of which this is the first; in a run, the run's own.

    Args:
        world: how many.

    Raises:
        StackFault: this process is one of another number.
    """
    if world > 1:
        import_module("torch.distributed._tools.fake_collectives")  # of tensors without values
    if dist.is_initialized():
        if dist.get_world_size() != world:
            raise StackFault(f"a plan for {world} processes cannot be made by one of {dist.get_world_size()}")
        yield
    elif world == 1:
        yield
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        hook = sys.excepthook
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook  # torch puts the rank before every line of a traceback
