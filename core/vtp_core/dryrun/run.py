"""``vtp train --dry-run``: the plan of a run on any number of processes, with what each holds, sends and writes."""

from __future__ import annotations

from typing import Any

from vtp_core.describe import plan, text_of
from vtp_core.dryrun.data import dealt
from vtp_core.dryrun.page import as_json, checkpoint_lines, data_lines, memory_table, traffic_table
from vtp_core.dryrun.writing import Checkpoint
from vtp_core.evaluation import probe_components
from vtp_core.stack import Stack


class DryRun:
    """A run as it would be, for people (``str``) and for programs (``data``).

    Args:
        stack: loaded.
        world: processes.

    Raises:
        StackFault: data or probes have options that a run would refuse, or whatever planning finds.
    """

    def __init__(self, stack: Stack, world: int = 1) -> None:
        probe_components(stack)
        self.shards = dealt(stack)
        self.page = plan(stack, world)
        self.costs, self.layout = self.page.costs, self.page.layout
        writers = world if self.costs.sharded else 1
        self.checkpoint = Checkpoint(self.costs.checkpoint, writers, self.costs.checkpoint_whole)

    @property
    def data(self) -> dict[str, Any]:
        """The plan's data, and more."""
        return {**self.page.data, **as_json(self.costs, self.checkpoint, self.shards)}

    def __str__(self) -> str:
        lines = [*checkpoint_lines(self.checkpoint), *data_lines(self.shards, self.layout)]
        tables: list[Any] = [memory_table(self.costs.memory, self.costs)]
        tables += [traffic_table(self.costs)] if self.costs.collectives else []
        return f"{self.page}\n{text_of(*tables, chr(10).join(lines))}"
