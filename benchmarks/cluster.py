"""How long a step would take on a cluster of GPUs, from the FLOPs and bytes of its plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vtp_core.costs import Costs
from vtp_core.dryrun.notes import Collective


@dataclass(frozen=True, slots=True)
class Cluster:
    """H100 SXM in machines of eight, each GPU with a 400 Gb/s network card of its own.

    Attributes:
        peak: FLOP/s of dense bfloat16 products.
        share: of the peak that a step's products reach.
        memory: bytes a second of a GPU's own memory.
        inside: bytes a second that a GPU sends within its machine, one way.
        outside: bytes a second that a GPU sends to other machines, one way.
        call: seconds that any collective takes.
        doubling: seconds that it takes longer for every doubling of the processes.
        machine: GPUs of one machine.
        capacity: bytes of a GPU's memory.
        usable: share of it that a step may take; the rest is the driver's, NCCL's and the allocator's gaps.
    """

    peak: float = 989e12
    share: float = 0.4
    memory: float = 3.35e12
    inside: float = 450e9
    outside: float = 50e9
    call: float = 10e-6
    doubling: float = 5e-6
    machine: int = 8
    capacity: float = 85e9
    usable: float = 0.9

    def fits(self, count: int) -> bool:
        """Whether a step of so many bytes has room on a GPU."""
        return count <= self.usable * self.capacity

    def seconds(self, collective: Collective, world: int) -> float:
        """Time of one collective: among the machines by every GPU's own card, then within each machine.

        Raises:
            ValueError: neither one machine, nor several that are full.
        """
        if world > self.machine and world % self.machine:
            raise ValueError(f"{world} GPUs fill no whole number of machines of {self.machine}")
        inside = min(world, self.machine)
        machines = world // inside
        rounds = 2 if collective.kind == "all_reduce" else 1
        among = (machines - 1) / machines * collective.size / inside / self.outside
        within = (inside - 1) / inside * collective.size / self.inside
        return rounds * (among + within) + self.call + self.doubling * math.log2(world)


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a step by what they go to; together they are the step.

    Attributes:
        compute: products, recomputed ones too.
        update: reading and writing of weights, moments and averages.
        gradients: averaged after the last backward: nothing runs beside it.
        losses: gathers and sums of coupled losses, and flags: nothing runs beside them.
        shards: fetching weights and scattering gradients, as far as it outlasts the products that run beside it.
    """

    compute: float
    update: float
    gradients: float
    losses: float
    shards: float

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.gradients + self.losses + self.shards


def step_of(costs: Costs, cluster: Cluster) -> Step:
    """A planned step on a cluster."""
    world, memory = costs.world, costs.memory

    def taken(causes: Iterable[str]) -> list[float]:
        return [cluster.seconds(c, world) for c in costs.collectives if c.cause in causes]

    compute = costs.step_flops / (cluster.peak * cluster.share)
    moved = 2 * (memory.parameters + memory.optimizer + memory.averages + memory.gradients)
    shards = taken({"shards"})
    # The first fetch and the last scatter have nothing to run beside.
    exposed = max(sum(shards) - compute, 0.0) + (shards[0] + shards[-1] if shards else 0.0)
    return Step(
        compute, moved / cluster.memory, sum(taken({"gradients"})),
        sum(taken({"losses", "balance", "control"})), exposed,
    )  # fmt: skip
