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
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast")
SILENT = ("barrier", "wait_tensor", "wrap_tensor")  # they send nothing that counts


@dataclass(frozen=True, slots=True)
class Collective:
    """One call that all processes make.

    Attributes:
        kind: one of :data:`KINDS`.
        cause: ``gradients``, ``shards``, ``losses``, ``balance`` or ``control``.
        owner: the objective whose forward it is in; empty in a backward and elsewhere.
        size: bytes of the whole: of what is reduced, scattered or exchanged, of what all have gathered.
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

    def __init__(self) -> None:
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
        """A collective was asked for: its operator's name and arguments.

        Raises:
            NotImplementedError: it is of a kind that is not counted.
        """
        if any(word in name for word in SILENT):
            return
        plain = name.replace("_", "")
        kind = next((kind for kind in KINDS if kind.replace("_", "") in plain), "")
        if not kind:
            raise NotImplementedError(f"a plan does not count {name}; it counts {', '.join(KINDS)}")
        owner = self.owner if isinstance(self.owner, str) else ""
        self.collectives.append(Collective(kind, _cause(arguments), owner, _whole(name, kind, arguments)))


def _whole(name: str, kind: str, arguments: Any) -> int:
    """Bytes of the whole of a collective, of which a process's part is an argument too.

    Operators of ``c10d`` are handed both what goes in and what comes out; those of ``_c10d_functional`` only what
    goes in, and where they gather, the number of processes after it.
    """
    largest = max(sum(t.nbytes for t in _tensors(argument)) for argument in arguments)
    gathers = name.startswith("_c10d_functional") and kind == "all_gather"
    return largest * int(arguments[1]) if gathers else largest


def _tensors(argument: Any) -> list[Tensor]:
    return [x for x in tree_iter(argument) if isinstance(x, Tensor)]


def _cause(arguments: Any) -> str:
    """What a collective is for, by who asks for it."""
    frame, names = sys._getframe(1), []
    numbers = all(x.is_floating_point() for x in _tensors(arguments))
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_globals.get("__name__", "")
        names.append(name)
        if frame.f_code.co_name == "average_gradients" and numbers:
            return "gradients"
    for module, cause in CAUSES.items():
        if any(name == module or name.startswith(f"{module}.") for name in names):
            return cause
    return "control"
