"""What a plan costs: a step of the engine on tensors without values, on the meta device. Reads no data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from vtp_core.adopting import conditioning
from vtp_core.announcing import announced
from vtp_core.build import Model, blueprint, build, spec_of
from vtp_core.dryrun.captions import captions_of, lengths
from vtp_core.dryrun.inputs import inputs_of
from vtp_core.dryrun.memory import Memory, size_of
from vtp_core.dryrun.notes import Collective
from vtp_core.dryrun.processes import processes
from vtp_core.dryrun.rehearsal import META, LeftOut, Rehearsal
from vtp_core.evaluation import dataset_factory
from vtp_core.exporters import exporters_of
from vtp_core.inputs import Inputs, Signals
from vtp_core.layout import Layout
from vtp_core.planner import Node, Plan
from vtp_core.rows import check_rows
from vtp_core.stack import Stack
from vtp_plugins.protocols import Dataset


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
        world: processes.
        nodes: cost of every node but inputs, of all micro-batches.
        objectives: forward FLOPs and saved bytes of each objective's own layers.
        left_out: objectives that look at values, which a plan does not have, with what they asked; or a node, and
            then nothing is counted.
        bounded: who picks by values, so that all is counted as picked.
        unshared: forward FLOPs of the nodes if every need ran a forward of its own.
        backward_flops: of everything that is no forward.
        parameters: trainable parameters by owner.
        ema: numbers in the EMA teacher and in a generator's average.
        memory: bytes by kind.
        collectives: of the step.
        checkpoint: bytes of a checkpoint by part, as this process writes them.
        checkpoint_whole: bytes of all processes together.
        sharded: owners whose weights are dealt over the processes.
        announced: what the run will say of its processes.
        captions: view of texts -> ids of a caption that are counted, and of its context.
        texts: captions of the data that these are the longest of; 0 where they fill their context.
    """

    plan: Plan
    world: int = 1
    nodes: dict[Node, Cost] = field(default_factory=dict)
    objectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bounded: list[str] = field(default_factory=list)
    unshared: int = 0
    unshared_forwards: int = 0
    backward_flops: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    ema: int = 0
    memory: Memory = field(default_factory=Memory)
    collectives: list[Collective] = field(default_factory=list)
    checkpoint: dict[str, int] = field(default_factory=dict)
    checkpoint_whole: int = 0
    sharded: list[str] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    captions: dict[str, tuple[int, int]] = field(default_factory=dict)
    texts: int = 0

    @property
    def forward_flops(self) -> int:
        own = sum(flops for flops, _ in self.objectives.values())
        return own + sum(cost.flops for cost in self.nodes.values())

    @property
    def step_flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def stage_bytes(self) -> list[int]:
        """Most bytes that autograd keeps at one time, by stage."""
        return [self.memory.stages.get(stage, 0) for stage in self.plan.stages]

    def sent_bytes(self, *causes: str) -> float:
        """Bytes that each process sends in a step, and receives, for some causes or for all."""
        return sum(c.sent(self.world) for c in self.collectives if not causes or c.cause in causes)


def cost(
    stack: Stack, world: int = 1, dataset: Dataset | None = None, shared: bool = True
) -> tuple[Costs, Layout]:
    """Count a stack's first full step, as the first process takes it.

    Args:
        stack: loaded.
        world: processes that share the batch.
        dataset: of the stack, if it is there already; a generator's condition and latents are asked of it.
        shared: count what sharing forwards saves, too.

    Raises:
        StackFault: the batch does not divide, or whatever else building and planning find.
    """
    plans, given = blueprint(stack), (0, 0)
    check_rows(stack, world)
    if plans.generator is not None:
        dataset = dataset or dataset_factory(stack, spec_of(plans))(None)
        given = conditioning(stack, dataset, exporters_of(stack, None, "cpu"))
    provided = frozenset() if dataset is None else dataset.provides
    texts = captions_of(plans, dataset)
    left_out: dict[str, str] = {}
    with processes(world):
        while True:
            with META:
                model = build(plans, *given)
            engine = Rehearsal(model, stack.train, stack.data.batch_size, provided, left_out)
            inputs = inputs_of(model, engine.layout, dataset, texts)
            try:
                engine.rehearse(inputs)
                found = _costs(engine, inputs, left_out, shared)
                found.captions, found.texts = lengths(model, inputs), len(texts)
                return found, engine.layout
            except LeftOut as fault:
                if isinstance(
                    fault.who, Node
                ):  # without it nothing can be counted, and a run goes on all the same
                    return Costs(engine.plan(), world, left_out={str(fault.who): str(fault)}), engine.layout
                left_out |= dict.fromkeys(_with_followers(model, fault.who), str(fault))


def _with_followers(model: Model, name: str) -> list[str]:
    """An objective and those whose weight is balanced against it."""
    balanced = [n for n, k in model.settings.items() if k.balance is not None and k.balance.against == name]
    return [name, *balanced]


def _costs(engine: Rehearsal, inputs: Inputs, left_out: dict[str, str], shared: bool) -> Costs:
    notes, model, layout = engine.notes, engine.model, engine.layout
    found = Costs(engine.plan(), engine.world, left_out=left_out, memory=engine.memory)
    signals = Signals(inputs, model.modality, model.spec.patch, META, torch.float32, layout.crop_free)
    for node, demand in found.plan.demands.items():
        if node.kind != "input":
            rows, crops = max(demand.rows.values()), signals.crops(node.view)
            tokens = rows * crops * math.prod(signals.grid(node.view) or model.spec.grid)
            found.nodes[node] = Cost(rows, crops, tokens, notes.flops[node], engine.saved.by[node])
    names = [n for n in model.objectives if n not in left_out]
    found.objectives = {
        n: (notes.flops[n], engine.saved.by[n]) for n in names if n in notes.flops or n in engine.saved.by
    }
    found.bounded = sorted(str(owner) for owner in notes.bounded if owner is not None)
    found.backward_flops = notes.flops[None]
    found.parameters = {o: sum(p.numel() for p in ps.values()) for o, ps in layout.owners().items() if ps}
    found.ema = sum(t.numel() for copies in (engine.ema, engine.average) for t in copies.state().values())
    found.collectives = notes.collectives
    found.checkpoint = {
        part: size_of(tensors.values()) for part, tensors in engine.state().items() if tensors
    }
    found.checkpoint_whole = sum(
        t.numel() * t.element_size() for ts in engine.state().values() for t in ts.values()
    )
    if shared:
        found.unshared, found.unshared_forwards = engine.alone(inputs)
    found.sharded = list(engine.sharding.roots)
    engine.device = _kind(engine.train_keys.device)
    found.announced = announced(engine)
    return found


def _kind(device: str) -> torch.device:
    """Where the run would compute."""
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")
