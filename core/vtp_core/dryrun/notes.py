"""What a rehearsed step does, by who does it: FLOPs, and what it sends to other processes."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

from vtp_core.nodes import Node

CAUSES = {
    "torch.distributed.fsdp": "shards",
    "vtp_core.clock": "losses",
    "vtp_core.balance": "balance",
    "vtp_core.distributed": "control",
}
"""Module that asks for a collective -> what it is for; gradients are told by their function."""


@dataclass(frozen=True, slots=True)
class Collective:
    """One call that all processes make.

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``broadcast``.
        cause: ``gradients``, ``shards``, ``losses``, ``balance`` or ``control``.
        owner: the objective whose forward it is in; empty in a backward and elsewhere.
        size: bytes of the whole: of what is reduced or scattered, of what all have gathered.
    """

    kind: str
    cause: str
    owner: str
    size: int

    def sent(self, world: int) -> float:
        """Bytes that each process sends, and receives, in a ring."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.size * (world - 1) / world


class Notes:
    """Kept while a step is rehearsed.

    Attributes:
        owner: who computes: a node, an objective's name, or None for the engine and backwards.
        failed: who computed when an exception came.
        flops: by owner.
        collectives: in order.
        bounded: who picks by values, so that all of it is counted.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.owner: Node | str | None = None
        self.failed: Node | str | None = None
        self.flops: Counter[Node | str | None] = Counter()
        self.collectives: list[Collective] = []
        self.bounded: set[Node | str | None] = set()

    @contextlib.contextmanager
    def of(self, owner: Node | str) -> Iterator[None]:
        """What happens inside is the owner's."""
        before, self.owner = self.owner, owner
        try:
            yield
        except Exception:
            self.failed = self.failed or owner
            raise
        finally:
            self.owner = before

    def counted(self, flops: int) -> None:
        """An operator was run."""
        self.flops[self.owner] += flops

    def picked(self) -> None:
        """Something was picked by unknown values."""
        self.bounded.add(self.owner)

    def sent(self, name: str, arguments: Any) -> None:
        """A collective was asked for: its operator's name and arguments."""
        name = name.lower().replace("_", "")
        kinds = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
        kind = next((kind for kind in kinds if kind.replace("_", "") in name), "")
        if not kind:
            return  # a wait or a barrier
        first = [x for x in tree_iter(arguments[0]) if isinstance(x, Tensor)]
        size = sum(x.nbytes for x in first)
        if kind == "reduce_scatter":
            size *= self.world  # its first argument is this process's part
        cause = _cause(first[0])
        self.collectives.append(
            Collective(kind, cause, self.owner if isinstance(self.owner, str) else "", size)
        )


def _cause(tensor: Tensor) -> str:
    """What a collective is for, by who asks for it."""
    frame, names = sys._getframe(1), []
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        names.append(name)
        if frame.f_code.co_name == "average_gradients" and tensor.is_floating_point():
            return "gradients"
    for module, cause in CAUSES.items():
        if any(name == module or name.startswith(f"{module}.") for name in names):
            return cause
    return "control"
