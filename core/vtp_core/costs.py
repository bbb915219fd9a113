"""What a plan costs, counted on the meta device: FLOPs, tokens, parameters, bytes. Reads no data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as meta
from torch.utils.flop_counter import FlopCounterMode

from vtp_core import schedule, state
from vtp_core.adopting import conditioning
from vtp_core.build import Model, blueprint, build, spec_of
from vtp_core.clock import StepClock
from vtp_core.evaluation import dataset_factory
from vtp_core.forwards import Forwards, Inputs
from vtp_core.layout import Layout
from vtp_core.planner import Node, Plan, Reader, plan
from vtp_core.stack import Stack
from vtp_core.teacher import EMATeacher
from vtp_core.tokenizer import exporters_of
from vtp_plugins.protocols import Dataset

META = torch.device("meta")


@dataclass(slots=True)
class Cost:
    """Of one node: rows, tokens over its crops, forward FLOPs, and bytes that autograd saves."""

    rows: int
    crops: int
    tokens: int
    flops: int
    saved: int


@dataclass(slots=True)
class Costs:
    """Of one step of one process.

    Attributes:
        plan: what was counted.
        nodes: cost of every node but inputs.
        objectives: forward FLOPs and saved bytes of each objective's own layers; None where they
            depend on values, which the meta device does not have.
        unshared: forward FLOPs of the nodes if every need ran a forward of its own.
        parameters: trainable parameters by owner.
        ema: parameters of the EMA teacher.
        element: bytes of one number.
    """

    plan: Plan
    nodes: dict[Node, Cost] = field(default_factory=dict)
    objectives: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    unshared: int = 0
    unshared_forwards: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    ema: int = 0
    element: int = 4

    @property
    def forward_flops(self) -> int:
        own = sum(cost[0] for cost in self.objectives.values() if cost is not None)
        return own + sum(cost.flops for cost in self.nodes.values())

    @property
    def step_flops(self) -> int:
        """Forward plus twice the forward for what gradient reaches."""
        own = sum(cost[0] for cost in self.objectives.values() if cost is not None)
        live = sum(cost.flops for node, cost in self.nodes.items() if node in self.plan.live)
        return self.forward_flops + 2 * (own + live)

    @property
    def sync_bytes(self) -> int:
        """Gradient bytes that one step averages over processes."""
        return sum(self.parameters.values()) * self.element

    def stage_bytes(self) -> list[int]:
        """Bytes that autograd saves, by stage."""
        sizes = []
        for stage in self.plan.stages:
            own = sum((self.objectives.get(name) or (0, 0))[1] for name in stage.readers)
            sizes.append(own + sum(self.nodes[node].saved for node in stage.nodes))
        return sizes

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, two optimizer moments, and the EMA teacher."""
        return (4 * sum(self.parameters.values()) + self.ema) * self.element


def cost(stack: Stack, world: int = 1, dataset: Dataset | None = None) -> tuple[Costs, Layout]:
    """Count a stack's first full step on the meta device.

    Args:
        stack: loaded.
        world: processes that share the batch.
        dataset: of the stack, if it is there already; a generator's condition and latents are asked of it.
    """
    plans, given = blueprint(stack), (0, 0)
    if plans.generator is not None:
        dataset = dataset or dataset_factory(stack, spec_of(plans))(None)
        given = conditioning(stack, dataset, exporters_of(stack, None, "cpu"))
    with META:
        model = build(plans, *given)
        ema, average = EMATeacher(state.shadowed(model)), EMATeacher(state.averaged(model))
    state.bind_shadows(model, ema)
    train = stack.train
    provided = frozenset() if dataset is None else dataset.provides
    layout = Layout(model, stack.data.batch_size, world, train.accumulate, provided)
    names = tuple(
        n
        for n, keys in model.settings.items()
        if schedule.is_active(keys, _start(model, train.steps), train.steps)
    )
    readers = layout.readers(names)
    counted = Costs(_plan(readers, model, layout), element=8 if train.precision == "float64" else 4)
    inputs = _inputs(model, layout, dataset)
    counting = _Counting(model, ema, layout, inputs)
    counting.nodes(counted)
    counting.objectives(counted, names)
    counting.unshared(counted, readers)
    counted.parameters = {o: sum(p.numel() for p in ps.values()) for o, ps in layout.owners().items() if ps}
    counted.ema = sum(t.numel() for copies in (ema, average) for t in copies.state().values())
    return counted, layout


def _start(model: Model, steps: int) -> int:
    """A step at which every objective has started."""
    from vtp_core.options import steps_of

    return max((steps_of(keys.start, steps) for keys in model.settings.values()), default=0)


def _plan(readers: list[Reader], model: Model, layout: Layout) -> Plan:
    def trains(module: str) -> bool:
        found = model.modules().get(module)
        return found is not None and any(p.requires_grad for p in found.parameters())

    return plan(readers, trains, layout.fields, layout.provided)


def _inputs(model: Model, layout: Layout, dataset: Dataset | None) -> Inputs:
    """Shapes of a micro-batch; views tell theirs on an empty sample, what a dataset provides on its first."""
    rows = {name: count // layout.accumulate for name, count in layout.rows_by_view().items()}
    views = {}
    for name, view in model.views.items():
        if name in rows:
            blank: Any = (
                ""
                if view.field == "text"
                else torch.zeros(
                    model.spec.signal_channels, *model.spec.size, dtype=torch.uint8, device="cpu"
                )
            )
            made = view(blank)
            views[name] = torch.empty(rows[name], *made.shape, dtype=made.dtype, device=META)
    sample = dataset[0] if dataset is not None and layout.provided else {}
    fields: dict[str, Any] = {}
    for name in layout.fields:
        value = sample.get(name)
        if name == model.condition and model.spec.condition == "embedding":
            value = torch.empty(model.spec.condition_width)
        whole = value if isinstance(value, Tensor) else torch.zeros((), dtype=torch.long)
        fields[name] = torch.empty(rows.get(name, 0), *whole.shape, dtype=whole.dtype, device=META)
    return Inputs(views, fields)


class _Counting:
    def __init__(self, model: Model, ema: EMATeacher, layout: Layout, inputs: Inputs) -> None:
        self.model, self.ema, self.layout = model, ema, layout
        self.clock = StepClock(device=META)
        self.inputs = Inputs(inputs.views, inputs.fields, layout.masks(inputs, StepClock()))

    def forwards(self, step_plan: Plan) -> Forwards:
        return Forwards(
            self.model, self.ema.modules, step_plan, self.inputs, self.clock, crop_free=self.layout.crop_free
        )

    def nodes(self, counted: Costs) -> None:
        """Run every node once and count it alone: its inputs are there already."""
        run = self.run = self.forwards(counted.plan)
        for node, demand in counted.plan.demands.items():
            if node.kind == "input":
                run.value(node)
                continue
            with _counted() as counter:
                run.value(node)
            crops = self.inputs.views[node.view].shape[1] if node.view in self.inputs.views else 1
            rows = max(demand.rows.values())
            grid = run.signals.grid(node.view) or self.model.spec.grid
            tokens = rows * crops * int(torch.Size(grid).numel())
            counted.nodes[node] = Cost(rows, crops, tokens, counter.flops, counter.saved)

    def objectives(self, counted: Costs, names: tuple[str, ...]) -> None:
        """Own layers of each objective, where they don't depend on values."""
        for name in names:
            got = {slot: self.run.hand(handout) for slot, handout in counted.plan.handouts[name, 0].items()}
            try:
                with _counted() as counter:
                    self.model.objectives[name](got, self.clock.of(name))
            except (RuntimeError, NotImplementedError):
                counted.objectives[name] = None
            else:
                counted.objectives[name] = (counter.flops, counter.saved)

    def unshared(self, counted: Costs, readers: list[Reader]) -> None:
        """Every need by itself, as if each objective called the encoder."""
        for reader in readers:
            for slot, need in reader.needs.items():
                alone = _plan([Reader(reader.name, {slot: need}, reader.rows)], self.model, self.layout)
                run = self.forwards(alone)
                with _counted() as counter:
                    for node in alone.demands:
                        run.value(node)
                counted.unshared += counter.flops
                counted.unshared_forwards += sum(node.kind == "encode" for node in alone.demands)


@dataclass
class _Counter:
    flops: int = 0
    saved: int = 0


@contextmanager
def _counted() -> Iterator[_Counter]:
    """Count FLOPs, and bytes that autograd keeps, each storage once and parameters not at all."""
    counter = _Counter()
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and not tensor.is_leaf:
            seen[storage._cdata] = storage  # held, so that an address is not given twice
            counter.saved += storage.nbytes()
        return tensor

    flops = FlopCounterMode(display=False)
    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    # A choice of rows by value counts as the choice of all: an upper bound, where meta tensors have no values.
    config: Any = meta  # its attributes are made at run time
    with config.patch(meta_nonzero_assume_all_nonzero=True), saved, flops:
        yield counter
    counter.flops = int(flops.get_total_flops())


def as_json(counted: Costs) -> Mapping[str, Any]:
    """The plan as plain data."""
    return {
        "forwards": [
            {
                "forward": str(node), "rows": c.rows, "crops": c.crops, "tokens": c.tokens, "flops": c.flops,
                "saved_bytes": c.saved, "outputs": counted.plan.demands[node].rows,
                "readers": list(counted.plan.demands[node].readers), "gradient": node in counted.plan.live,
            }
            for node, c in counted.nodes.items()
        ],
        "stages": [
            {"forwards": [str(n) for n in s.nodes], "readers": list(s.readers), "saved_bytes": size}
            for s, size in zip(counted.plan.stages, counted.stage_bytes(), strict=True)
        ],
        "parameters": counted.parameters, "ema_parameters": counted.ema,
        "flops": {"forward": counted.forward_flops, "step": counted.step_flops, "unshared_forward": counted.unshared},
        "bytes": {"state": counted.state_bytes, "largest_stage": max(counted.stage_bytes(), default=0),
                  "synchronise": counted.sync_bytes},
    }  # fmt: skip
