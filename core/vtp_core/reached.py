"""What gradient reaches where weights are dealt: FSDP2 fetches and averages the same on all processes, or hangs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from vtp_core import distributed
from vtp_core.errors import PluginFault
from vtp_core.peers import PULSE
from vtp_core.shards import is_shard

Edge = tuple[Any, int]


class Reached:
    """Of one run's dealt modules: which of their forwards and weights get gradient, on any process."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, list[Edge]]] = []
        self._weights: list[nn.Parameter] = []
        self._used: list[bool] = []

    def watch(self, root: Any) -> None:
        """Note from here on which weights of a dealt module get gradient; every process must call this.

        One whose gradient only some processes have counts as zero on the others; one that no process has a gradient
        for stays without, so that optimizers skip it, as they do in one process.
        """
        for part in [module for module in root.modules() if hasattr(module, "unshard")]:
            dealt = {name: weight for name, weight in part.named_parameters() if is_shard(weight)}
            part.unshard()
            for name, weight in dealt.items():
                if weight.requires_grad and not is_shard(whole := part.get_parameter(name)):
                    whole.register_post_accumulate_grad_hook(partial(self._note, len(self._weights)))
                    self._weights.append(weight)
                    self._used.append(False)
            part.reshard()

    def _note(self, index: int, _: Tensor) -> None:
        self._used[index] = True

    def called(self, name: str, outputs: Iterable[Tensor]) -> None:
        """A dealt module has given these, which gradient may reach."""
        self._calls.append((name, [_edge(output) for output in outputs]))

    def agree(self, outputs: Sequence[Tensor]) -> None:
        """Hold what a backward of ``outputs`` will reach against the other processes; all of them must call this.

        Raises:
            PluginFault: on every process, as FSDP2 would wait for a fetch that some of them do not join.
        """
        calls, self._calls = self._calls, []
        if not calls:
            return
        edges = set(_behind(outputs, {edge for _, own in calls for edge in own}))
        found = [not edges.isdisjoint(own) for _, own in calls]
        same = torch.tensor([*found, *(not flag for flag in found)], dtype=torch.uint8)
        with PULSE.collective():
            dist.all_reduce(same, dist.ReduceOp.MIN)
        everywhere, nowhere = same.chunk(2)
        odd = [
            i for i, (a, b) in enumerate(zip(everywhere.tolist(), nowhere.tolist(), strict=True)) if not a + b
        ]
        if odd:
            everyone = distributed.gathered(found[odd[0]])
            raise PluginFault(_message(calls[odd[0]][0], everyone))

    @torch.no_grad()
    def settle(self) -> None:
        """All gradients are averaged: drop those that no process has had; every process must call this."""
        if not self._weights:
            return
        used = torch.tensor(self._used, dtype=torch.uint8)
        with PULSE.collective():
            dist.all_reduce(used, dist.ReduceOp.MAX)
        for weight, flag in zip(self._weights, used.tolist(), strict=True):
            if not flag:
                weight.grad = None
        self._used = [False] * len(self._used)


def _edge(output: Tensor) -> Edge:
    edge = get_gradient_edge(output)
    return edge.node, edge.output_nr


def _behind(outputs: Sequence[Tensor], wanted: set[Edge]) -> Iterator[Edge]:
    """Those of the edges that a backward of the outputs comes to first; what lies behind one is not looked at."""
    waiting: list[Edge] = [_edge(output) for output in outputs]
    seen = set()
    while waiting:
        edge = waiting.pop()
        if edge in wanted:
            yield edge
        elif edge[0] is not None and edge[0] not in seen:
            seen.add(edge[0])
            waiting += edge[0].next_functions


def _message(name: str, everyone: Sequence[bool]) -> str:
    reached = [str(rank) for rank, flag in enumerate(everyone) if flag]
    missed = [str(rank) for rank, flag in enumerate(everyone) if not flag]
    return (
        f"train.parallel=fsdp2: in this step gradient reaches {name} in process {', '.join(reached)} and not in "
        f"process {', '.join(missed)}; an objective has a loss without a gradient in some processes: let it return "
        "0 * output.sum() where it has nothing to learn from, or use train.parallel=replicated"
    )
