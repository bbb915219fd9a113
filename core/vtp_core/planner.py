"""Needs to nodes to stages: the fewest forwards that give every objective what it reads.

A node is one forward of one module: encode, bottleneck, decode, generate, teach, or an input taken as
it is. Nodes that agree in everything that matters to them are one. A stage is a connected component of
nodes that gradient links; stages run forward-loss-backward one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from vtp_core.errors import StackFault
from vtp_core.nodes import MODULES as MODULES
from vtp_core.nodes import Demand as Demand
from vtp_core.nodes import Handout as Handout
from vtp_core.nodes import Node as Node
from vtp_core.nodes import Plan as Plan
from vtp_core.nodes import Reader as Reader
from vtp_core.nodes import Stage as Stage
from vtp_core.nodes import Turn as Turn
from vtp_core.stages import stages_of
from vtp_plugins.needs import Need

ENCODED = frozenset({"cls", "patches", "hidden"})
LATENT = frozenset({"latent", "indices", "posterior"})
DECODED = frozenset({"decoded", "decoder.hidden"})
GENERATED = frozenset({"prediction", "variance", "target", "clean", "noise", "noised", "u", "hidden"})


def family(output: str) -> str:
    """Its kind by its name: ``hidden:4``, ``latent.cls`` and ``patches@block`` lose their tails."""
    name = output.partition("@")[0].partition(":")[0]
    return "latent" if name.startswith("latent.") else name


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
        StackFault: an output has no source, or a need with mask ``any`` meets two mask samplers.
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
        self.readers, self.trains = readers, trains
        self.fields, self.provided = fields, provided
        self.demands: dict[Node, Demand] = {}
        self.masks = self._masks()

    def _masks(self) -> dict[tuple[str, str], dict[str, str]]:
        """(view, source) -> mask samplers asked for by name -> who asks."""
        found: dict[tuple[str, str], dict[str, str]] = {}
        for reader in self.readers:
            for need in reader.needs.values():
                if need.mask is not None and need.mask != "any":
                    found.setdefault((need.view, need.source), {}).setdefault(need.mask, reader.name)
        return found

    def run(self) -> Plan:
        handouts = {
            turn: {slot: self._handout(reader, need, turn[1]) for slot, need in reader.needs.items()}
            for reader in self.readers
            for turn in reader.turns
        }
        wanted: set[Node] = set()
        for reader in self.readers:
            if reader.learns:
                for turn in reader.turns:
                    for handout in handouts[turn].values():
                        for node in handout.outputs.values():
                            wanted |= _uncut(node)
        live = frozenset(node for node in wanted if self._moves(node))
        stages = stages_of(self.demands, live, handouts, self.readers)
        watchers = frozenset(reader.name for reader in self.readers if not reader.learns)
        masks = {node.mask for node in self.demands if node.mask}
        masks |= {h.mask for slots in handouts.values() for h in slots.values() if h.mask}
        return Plan(self.demands, stages, handouts, live, watchers, frozenset(masks))

    def _handout(self, reader: Reader, need: Need, turn: int) -> Handout:
        own = replace(need, draw=f"{need.draw}#{turn}") if turn else need
        outputs = {output: self._node(own, output, reader.name) for output in sorted(need.want)}
        for output, node in outputs.items():
            self._demand(node, output, reader.rows, reader.name)
        places = (output.partition("@")[2] for output in outputs if "@" in output)
        named = need.mask if need.mask != "any" else None
        mask = next(places, None) or named or next((n.mask for n in outputs.values() if n.mask), None)
        return Handout(need, outputs, reader.rows, mask)

    def _demand(self, node: Node, output: str, rows: int, reader: str) -> None:
        """Ask for an output and for what it is made from; inputs land in ``demands`` first."""
        if node.reads is not None:
            self._demand(node.reads, _made_from(node, output), rows, reader)
        self.demands.setdefault(node, Demand()).add(output, rows, reader)

    # ---- from a need to a node

    def _node(self, need: Need, output: str, reader: str) -> Node:
        """The node that gives an output of a need."""
        kind = family(output)
        if kind == "input":
            return Node("input", need.view)
        if need.source.startswith("teacher:"):
            ready = f"{need.source}/{output}"
            return Node("input", ready) if ready in self.provided else Node("teach", need.view, need.source)
        if need.source == "generator" and kind in GENERATED:
            return self._generate(need, reader)
        if kind in LATENT:
            return self._latent(need, reader)
        if need.view in self.fields:
            raise StackFault(
                f"objectives.{reader}: {need.view!r} is a raw field, whose only output is 'input', "
                f"not {output!r}"
            )
        if kind in ENCODED:
            return self._encode(need, reader)
        if kind in DECODED and need.source != "ema":
            return self._decode(need, reader)
        raise StackFault(f"objectives.{reader}: nothing gives an output {output!r} of source {need.source!r}")

    def _encode(self, need: Need, reader: str) -> Node:
        mask = self._any(need, reader) if need.mask == "any" else need.mask
        if need.source == "ema":
            return Node("encode", need.view, "ema", mask=mask, mode="eval")
        mode = self._mode("encoder", need)
        drop = need.drop if mode == "train" else None
        return Node("encode", need.view, mask=mask, drop=drop, mode=mode, through="encoder" in need.through)

    def _any(self, need: Need, reader: str) -> str | None:
        """The mask that ``any`` takes: of whoever masks this view, if somebody does."""
        found = self.masks.get((need.view, need.source), {})
        if len(found) > 1:
            both = " and ".join(f"{mask!r} (objectives.{owner})" for mask, owner in found.items())
            raise StackFault(
                f"objectives.{reader} takes any mask of view {need.view!r}, which is masked by both {both}; "
                "give one of them a view of its own"
            )
        return next(iter(found), None)

    def _latent(self, need: Need, reader: str) -> Node:
        if "latent" in self.provided:
            return Node("input", "latent")
        if need.view in self.fields:
            raise StackFault(f"objectives.{reader}: {need.view!r} is a raw field and has no latent")
        reads, cut = self._encode(need, reader), "patches" in need.cut
        if need.source == "ema":
            return Node("bottleneck", need.view, "ema", mode="eval", draw=need.draw, reads=reads)
        # Not self._mode: a frozen bottleneck still adds the noise that a decoder trains on.
        through = "bottleneck" in need.through
        return Node(
            "bottleneck", need.view, mode=need.mode, through=through, cut=cut, draw=need.draw, reads=reads
        )

    def _decode(self, need: Need, reader: str) -> Node:
        reads = self._latent(need, reader)
        mode, through, cut = self._mode("decoder", need), "decoder" in need.through, "latent" in need.cut
        return Node("decode", reads.view, mode=mode, through=through, cut=cut, reads=reads)

    def _generate(self, need: Need, reader: str) -> Node:
        """A generator's forward; mode and draw are its own, the latent it reads is everybody's."""
        reads = self._latent(replace(need, mode="train", draw="main", source="student"), reader)
        mode, through, cut = self._mode("generator", need), "generator" in need.through, "latent" in need.cut
        return Node("generate", reads.view, mode=mode, through=through, cut=cut, draw=need.draw, reads=reads)

    def _mode(self, module: str, need: Need) -> str:
        """A module that does not train runs in eval mode: no drop-path, no batch statistics."""
        return need.mode if self.trains(module) else "eval"

    # ---- gradient

    def _moves(self, node: Node) -> bool:
        """Whether anything that trains lies behind a node."""
        if node.kind in {"input", "teach"} or node.source == "ema":
            return False
        if self.trains(node.module) and not node.through:
            return True
        return node.reads is not None and not node.cut and self._moves(node.reads)


def _uncut(node: Node) -> set[Node]:
    """A node and what it reads, as far as gradient can go."""
    found = {node}
    while node.reads is not None and not node.cut:
        node = node.reads
        found.add(node)
    return found


def _made_from(node: Node, output: str) -> str:
    """The output of ``node.reads`` that ``output`` is computed from."""
    if node.kind == "decode":
        return "carried"
    if node.kind == "generate":
        return "latent"
    if output == "latent.cls":
        return "cls"
    return f"patches{''.join(output.partition('@')[1:])}"
