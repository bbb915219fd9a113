"""Which shards a process reads, from a dataset's manifest; no shard is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtp_core.build import blueprint, spec_of
from vtp_core.errors import Fault, StackFault
from vtp_core.evaluation import dataset_component
from vtp_core.stack import Stack


@dataclass(frozen=True, slots=True)
class Dealt:
    """How samples reach the processes.

    Attributes:
        shards: (name, samples) of every shard that is known.
        unknown: why none is; empty where the manifest was read.
        window: shards that are mixed with each other, and so open together.
    """

    shards: Sequence[tuple[str, int]] = ()
    unknown: str = ""
    window: int = 0

    @property
    def samples(self) -> int:
        """Of one epoch."""
        return sum(count for _, count in self.shards)


def dealt(stack: Stack) -> Dealt:
    """The shards of a stack's data, if reading a manifest tells them.

    Raises:
        StackFault: an option of the data is unknown or wrong; one that is missing, as its path, is not needed here.
    """
    try:
        component = dataset_component(stack)
    except StackFault as fault:
        if all(line.endswith(": is missing") for line in str(fault).splitlines()):
            return Dealt(unknown=str(fault).splitlines()[0])
        raise
    try:
        if not hasattr(component.cls, "shards"):
            return Dealt(unknown=f"{component.name} has no manifest")
        dataset = component.build(spec_of(blueprint(stack)))
    except Fault as fault:
        return Dealt(unknown=str(fault).splitlines()[0])
    return Dealt(dataset.shards, window=getattr(dataset, "window", len(dataset.shards)))
