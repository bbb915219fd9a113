"""Needs to nodes to stages: the fewest forwards that give every objective what it reads.

A node is one forward of one module: encode, bottleneck, decode, generate, teach, or an input taken as
it is. Nodes that agree in everything that matters to them are one. A stage is a connected component of
nodes that gradient links; stages run forward-loss-backward one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from vtp_core.errors import StackFault
from vtp_plugins.needs import Need

_GENERATOR_OUTPUTS = ("prediction", "target", "noised", "u", "hidden")


@dataclass(frozen=True, slots=True)
class Node:
    """One forward. Fields that don't matter to its kind keep their defaults, so that equal work is one node."""

    kind: str  # input, encode, bottleneck, decode, generate, teach
    view: str
    source: str = "student"
    mask: str | None = None
    drop: float | None = None
    mode: str = "train"
    through: bool = False
    cut: bool = False
    draw: str = ""
    reads: Node | None = None

    @property
    def module(self) -> str:
        """Name of the module it runs: encoder, bottleneck, decoder, generator, teacher:<name>, or empty."""
        if self.kind == "teach":
            return self.source
        names = {"encode": "encoder", "bottleneck": "bottleneck", "decode": "decoder", "generate": "generator"}
        return names.get(self.kind, "")

    def __str__(self) -> str:
        marks = [self.view]
        if self.source != "student" and self.kind not in {"teach", "generate"}:
            marks.append(self.source)
        if self.mask:
            marks.append(f"mask {self.mask}")
        if self.through:
            marks.append("no gradient to its parameters")
        if self.cut:
            marks.append("input cut")
        if self.mode == "eval":
            marks.append("eval")
        if "#" in self.draw:
            marks.append(f"draw {self.draw}")
        return f"{self.module or self.kind}({', '.join(marks)})"


@dataclass(frozen=True, slots=True)
class Reader:
    """An active objective as the planner sees it.

    Attributes:
        name: of the instance.
        needs: slot -> need.
        rows: rows of this process's batch that it reads.
        repeat: evaluations per step, each with draws of its own.
        against: instance whose gradient balances this one's weight.
    """

    name: str
    needs: Mapping[str, Need]
    rows: int
    repeat: int = 1
    against: str | None = None


@dataclass(slots=True)
class Demand:
    """What is read of a node: rows by output, and by whom."""

    rows: dict[str, int] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)  # ordered

    def add(self, output: str, rows: int, reader: str) -> None:
        self.rows[output] = max(rows, self.rows.get(output, 0))
        self.readers[reader] = None


@dataclass(frozen=True, slots=True)
class Handout:
    """Where one slot of one evaluation of an objective gets its outputs."""

    need: Need
    outputs: Mapping[str, Node]
    rows: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Nodes alive together, in the order they run, and the objectives that are evaluated on them."""

    nodes: tuple[Node, ...]
    readers: tuple[str, ...]


@dataclass(slots=True)
class Plan:
    """A step.

    Attributes:
        demands: every node with what is read of it, inputs before what reads them.
        stages: in the order they run.
        handouts: (reader, evaluation) -> slot -> handout.
        live: nodes that gradient reaches.
    """

    demands: dict[Node, Demand]
    stages: tuple[Stage, ...]
    handouts: dict[tuple[str, int], dict[str, Handout]]
    live: frozenset[Node]


def plan(
    readers: Iterable[Reader],
    trains: Callable[[str], bool] = lambda module: not module.startswith("teacher:"),
    fields: frozenset[str] = frozenset({"text", "label"}),
    provided: frozenset[str] = frozenset(),
) -> Plan:
    """Plan a step.

    Args:
        readers: active objectives, in the stack's order.
        trains: whether a module (``encoder``, ``bottleneck``, ...) has parameters that train.
        fields: raw fields; a need on one takes it as it is.
        provided: outputs the dataset supplies; no encoder runs for them.

    Raises:
        StackFault: an output has no source, or a view has two mask samplers for one need.
    """
    return _Planner(list(readers), trains, fields, provided).run()


class _Planner:
    def __init__(
        self,
        readers: list[Reader],
        trains: Callable[[str], bool],
        fields: frozenset[str],
        provided: frozenset[str],
    ) -> None:
        self.readers = readers
        self.trains = trains
        self.fields = fields
        self.provided = provided
        self.demands: dict[Node, Demand] = {}
        self.masks = self._masks()

    def _masks(self) -> dict[tuple[str, str], str]:
        """(view, source) -> the mask that ``any`` resolves to."""
        found: dict[tuple[str, str], str] = {}
        for reader in self.readers:
            for need in reader.needs.values():
                if need.mask in {None, "any"}:
                    continue
                place = (need.view, need.source)
                if found.setdefault(place, str(need.mask)) != need.mask:
                    raise StackFault(
                        f"objectives.{reader.name}: view {need.view!r} is masked by both {found[place]!r} and "
                        f"{need.mask!r}; a need with mask 'any' can't choose, name one view per mask"
                    )
        return found

    def run(self) -> Plan:
        handouts: dict[tuple[str, int], dict[str, Handout]] = {}
        for reader in self.readers:
            for turn in range(reader.repeat):
                handouts[reader.name, turn] = {
                    slot: self._handout(reader, need, turn) for slot, need in reader.needs.items()
                }
        live = frozenset(node for node in self.demands if self._live(node))
        return Plan(self.demands, self._stages(handouts, live), handouts, live)

    def _handout(self, reader: Reader, need: Need, turn: int) -> Handout:
        draw = f"{need.draw}#{turn}" if reader.repeat > 1 else need.draw
        outputs = {}
        for output in sorted(need.want):
            node = self._node(need, output, draw, reader.name)
            self._demand(node, output, reader.rows, reader.name)
            outputs[output] = node
        return Handout(need, outputs, reader.rows)

    def _node(self, need: Need, output: str, draw: str, reader: str) -> Node:
        """The node that gives an output of a need."""
        base = output.partition("@")[0]
        if need.view in self.fields or base == "input":
            return Node("input", need.view)
        if need.source.startswith("teacher:"):
            return Node("teach", need.view, need.source)
        if need.source == "generator" and base.partition(":")[0] in _GENERATOR_OUTPUTS:
            reads = self._latent(need, draw)
            return Node(
                "generate", need.view, mode=need.mode, through="generator" in need.through,
                cut="latent" in need.cut, draw=draw, reads=reads,
            )  # fmt: skip
        if base in {"cls", "patches"} or base.startswith("hidden:"):
            return self._encode(need)
        if base.startswith("latent") or base in {"indices", "posterior"}:
            return self._latent(need, draw)
        if base == "decoded" or base.startswith("decoder.hidden:"):
            if need.source == "ema":
                raise StackFault(f"objectives.{reader}: the EMA teacher has no decoder; read {output!r} of the student")
            return Node(
                "decode", need.view, mode=need.mode, through="decoder" in need.through,
                cut="latent" in need.cut, reads=self._latent(need, draw),
            )  # fmt: skip
        raise StackFault(f"objectives.{reader}: nothing gives an output {output!r} of source {need.source!r}")

    def _encode(self, need: Need) -> Node:
        source = "ema" if need.source == "ema" else "student"
        mask = self.masks.get((need.view, need.source)) if need.mask == "any" else need.mask
        return Node(
            "encode", need.view, source, mask=mask, drop=need.drop, mode=need.mode,
            through="encoder" in need.through,
        )  # fmt: skip

    def _latent(self, need: Need, draw: str) -> Node:
        if "latent" in self.provided:
            return Node("input", "latent")
        source = "ema" if need.source == "ema" else "student"
        return Node(
            "bottleneck", need.view, source, mode=need.mode, through="bottleneck" in need.through,
            cut="patches" in need.cut, draw=draw, reads=self._encode(need),
        )  # fmt: skip

    def _demand(self, node: Node, output: str, rows: int, reader: str) -> None:
        """Ask for an output and for what it is made from; inputs land in ``demands`` first."""
        if node.reads is not None:
            self._demand(node.reads, _made_from(node, output), rows, reader)
        self.demands.setdefault(node, Demand()).add(output, rows, reader)

    def _live(self, node: Node) -> bool:
        """Whether gradient reaches the node: its module trains, or an input that is not cut is live."""
        if node.kind in {"input", "teach"} or node.source == "ema":
            return False
        if self.trains(node.module) and not node.through:
            return True
        return node.reads is not None and not node.cut and self._live(node.reads)

    def _stages(self, handouts: dict[tuple[str, int], dict[str, Handout]], live: frozenset[Node]) -> tuple[Stage, ...]:
        groups = _Groups([*live, *(r.name for r in self.readers)])
        for node in live:
            if node.reads in live and not node.cut:
                groups.join(node, node.reads)
        for reader in self.readers:
            if reader.against is not None:
                groups.join(reader.name, reader.against)
            for turn in range(reader.repeat):
                for handout in handouts[reader.name, turn].values():
                    for node in handout.outputs.values():
                        if node in live:
                            groups.join(reader.name, node)
        self._break_cycles(groups, live)
        return self._ordered(groups, live)

    def _edges(self, groups: _Groups, live: frozenset[Node]) -> set[tuple[object, object]]:
        """(earlier, later): a stage that reads a cut value runs after the stage that makes it."""
        edges = set()
        for node in live:
            if node.reads in live and groups.of(node) is not groups.of(node.reads):
                edges.add((groups.of(node.reads), groups.of(node)))
        return edges

    def _break_cycles(self, groups: _Groups, live: frozenset[Node]) -> None:
        """Two stages that read each other's cut values can only run together."""
        edges = self._edges(groups, live)
        for earlier, later in edges:
            if (later, earlier) in edges:
                groups.join(earlier, later)

    def _ordered(self, groups: _Groups, live: frozenset[Node]) -> tuple[Stage, ...]:
        edges = self._edges(groups, live)
        roots: dict[object, None] = {}
        for reader in self.readers:
            roots[groups.of(reader.name)] = None
        ordered: list[object] = []
        while len(ordered) < len(roots):
            ready = [r for r in roots if r not in ordered and all(a in ordered or a not in roots for a, b in edges if b is r)]
            ordered.append(ready[0])
        return tuple(
            Stage(
                tuple(n for n in self.demands if n in live and groups.of(n) is root),
                tuple(r.name for r in self.readers if groups.of(r.name) is root),
            )
            for root in ordered
        )


def _made_from(node: Node, output: str) -> str:
    """The output of ``node.reads`` that ``output`` is computed from."""
    if node.kind == "decode":
        return "carried"
    if node.kind == "generate":
        return "latent"
    base, at, place = output.partition("@")
    if base == "latent.cls":
        return "cls"
    return f"patches{at}{place}"


class _Groups:
    """Union-find over nodes and reader names."""

    def __init__(self, items: Iterable[object]) -> None:
        self.parent = {item: item for item in items}

    def of(self, item: object) -> object:
        while self.parent[item] is not item:
            item = self.parent[item]
        return item

    def join(self, a: object, b: object) -> None:
        self.parent[self.of(a)] = self.of(b)
