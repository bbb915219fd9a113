"""The words of a plan: nodes, who reads them, stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vtp_plugins.needs import Need

MODULES = {"encode": "encoder", "bottleneck": "bottleneck", "decode": "decoder", "generate": "generator"}
"""Kind of a node -> the module it runs; ``teach`` runs the teacher that ``source`` names, ``input`` none."""

Turn = tuple[str, int]
"""One evaluation of an objective in a step: its instance name and 0, or 0 to K - 1 when it repeats."""


@dataclass(frozen=True, slots=True)
class Node:
    """One forward. Fields that don't matter to its kind keep their defaults: equal work is one node."""

    kind: str
    view: str
    source: str = "student"
    mask: str | None = None
    drop: float | None = None
    mode: str = "train"
    through: bool = False
    cut: bool = False
    draw: str = ""
    reads: Node | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = (
            self.kind,
            self.view,
            self.source,
            self.mask,
            self.drop,
            self.mode,
            self.through,
            self.cut,
            self.draw,
        )
        object.__setattr__(self, "_hash", hash((own, self.reads)))

    def __hash__(self) -> int:
        return self._hash  # computed once: nodes are looked up many times a step

    @property
    def module(self) -> str:
        """Name of the module it runs: encoder, bottleneck, decoder, generator, teacher:<name>, or empty."""
        return self.source if self.kind == "teach" else MODULES.get(self.kind, "")

    def __str__(self) -> str:
        marks = {
            self.view: True,
            self.source: self.source != "student" and self.kind != "teach",
            f"mask {self.mask}": self.mask is not None,
            f"drop {self.drop}": self.drop is not None,
            "no gradient to its parameters": self.through,
            "input cut": self.cut,
            "eval": self.mode == "eval" and self.source == "student",
            f"draw {self.draw}": self.draw not in {"", "main"},
        }
        return f"{self.module or self.kind}({', '.join(mark for mark, shown in marks.items() if shown)})"


@dataclass(frozen=True, slots=True)
class Reader:
    """An active objective as the planner sees it.

    Attributes:
        name: of the instance.
        needs: slot -> need.
        rows: rows of this process's micro-batch that it reads.
        repeat: evaluations per step, each with draws of its own.
        against: instance whose gradient balances this one's weight.
        learns: whether its losses are taken; a critic may watch before its objective starts.
    """

    name: str
    needs: Mapping[str, Need]
    rows: int
    repeat: int = 1
    against: str | None = None
    learns: bool = True

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Its evaluations."""
        return tuple((self.name, index) for index in range(self.repeat))


@dataclass(slots=True)
class Demand:
    """What is read of a node: rows by output, and by whom."""

    rows: dict[str, int] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)  # ordered

    def add(self, output: str, rows: int, reader: str) -> None:
        """Ask for an output; the largest number of rows counts, smaller readers take a prefix."""
        self.rows[output] = max(rows, self.rows.get(output, 0))
        self.readers[reader] = None


@dataclass(frozen=True, slots=True)
class Handout:
    """Where one slot of one evaluation of an objective gets its outputs.

    Attributes:
        need: what is read.
        outputs: output -> the node that gives it.
        rows: that the objective reads.
        mask: sampler whose mask goes along: of ``output@NAME``, else the need's, else what ``any`` took.
    """

    need: Need
    outputs: Mapping[str, Node]
    rows: int
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Nodes alive together, in the order they run, and the evaluations made on them.

    Attributes:
        nodes: those that gradient reaches.
        turns: evaluations, in the stack's order.
        keep: nodes computed by now whose values a later stage reads.
    """

    nodes: tuple[Node, ...]
    turns: tuple[Turn, ...]
    keep: frozenset[Node] = frozenset()

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of its objectives."""
        return tuple(dict.fromkeys(name for name, _ in self.turns))


@dataclass(slots=True)
class Plan:
    """A step.

    Attributes:
        demands: every node with what is read of it, inputs before what reads them.
        stages: in the order they run.
        handouts: evaluation -> slot -> handout.
        live: nodes that gradient reaches.
        watchers: objectives whose critic looks on; their losses are not taken.
        masks: samplers that the step needs.
    """

    demands: dict[Node, Demand]
    stages: tuple[Stage, ...]
    handouts: dict[Turn, dict[str, Handout]]
    live: frozenset[Node]
    watchers: frozenset[str] = frozenset()
    masks: frozenset[str] = frozenset()
