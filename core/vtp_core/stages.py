"""Nodes to stages: connected components under gradient, ordered so that cut values are there when read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from vtp_core.nodes import Handout, Node, Reader, Stage, Turn

Handouts = Mapping[Turn, Mapping[str, Handout]]


def stages_of(
    nodes: Iterable[Node], live: frozenset[Node], handouts: Handouts, readers: Sequence[Reader]
) -> tuple[Stage, ...]:
    """Stages in the order they run.

    Evaluations and live nodes are in one stage if gradient links them: a common live node, an input that
    is not cut, a balance reference. A stage that reads a value of another runs after it; two that read
    each other's run together.

    Args:
        nodes: all of a plan, inputs before what reads them.
        live: those that gradient reaches.
        handouts: what every evaluation reads.
        readers: active objectives, in the stack's order.
    """
    groups = _linked(live, handouts, readers)
    for earlier, later in (after := _closure(_edges(groups, live, handouts))):
        if (later, earlier) in after:
            groups.join(earlier, later)
    ordered = _ordered(
        list(dict.fromkeys(groups.of(turn) for turn in handouts)), _edges(groups, live, handouts)
    )
    turns = [tuple(turn for turn in handouts if groups.of(turn) == root) for root in ordered]
    alive = [tuple(node for node in nodes if node in live and groups.of(node) == root) for root in ordered]
    return tuple(
        Stage(own, evaluations, _kept(turns[: index + 1], turns[index + 1 :], handouts))
        for index, (own, evaluations) in enumerate(zip(alive, turns, strict=True))
    )


def _linked(live: frozenset[Node], handouts: Handouts, readers: Sequence[Reader]) -> _Groups:
    groups = _Groups([*live, *handouts])
    for node in live:
        if node.reads in live and not node.cut:
            groups.join(node, node.reads)
    for turn, node in _read(handouts):
        if node in live:
            groups.join(turn, node)
    evaluations = {reader.name: reader.turns for reader in readers}
    for reader in readers:
        if reader.against is not None:  # the ratio is of the two objectives' whole gradients
            both = [*reader.turns, *evaluations[reader.against]]
            for turn in both[1:]:
                groups.join(both[0], turn)
    return groups


def _read(handouts: Handouts) -> Iterator[tuple[Turn, Node]]:
    for turn, slots in handouts.items():
        for handout in slots.values():
            for node in handout.outputs.values():
                yield turn, node


def _edges(groups: _Groups, live: frozenset[Node], handouts: Handouts) -> set[tuple[object, object]]:
    """(earlier, later) groups, for every value that leaves its group."""
    reads = [(node, node.reads) for node in live] + list(_read(handouts))
    edges = set()
    for reader, node in reads:
        while node is not None and node not in live:
            node = node.reads
        if node is not None and groups.of(node) != groups.of(reader):
            edges.add((groups.of(node), groups.of(reader)))
    return edges


def _closure(edges: set[tuple[object, object]]) -> set[tuple[object, object]]:
    reached = set(edges)
    while more := {(a, d) for a, b in reached for c, d in reached if b == c} - reached:
        reached |= more
    return reached


def _ordered(roots: list[object], edges: set[tuple[object, object]]) -> list[object]:
    """Roots so that every edge points onwards; otherwise in the stack's order."""
    ordered: list[object] = []
    while len(ordered) < len(roots):
        waiting = [root for root in roots if root not in ordered]
        ordered.append(next(r for r in waiting if not any(b == r and a in waiting for a, b in edges)))
    return ordered


def _kept(
    past: Sequence[Sequence[Turn]], future: Sequence[Sequence[Turn]], handouts: Handouts
) -> frozenset[Node]:
    """Nodes that exist after the stages of ``past`` and that those of ``future`` read."""
    computed = {node for _, top in _read(_of(past, handouts)) for node in _line(top)}
    kept = set()
    for _, node in _read(_of(future, handouts)):
        found = next((n for n in _line(node) if n in computed), None)
        if found is not None:
            kept.add(found)
    return frozenset(kept)


def _of(stages: Sequence[Sequence[Turn]], handouts: Handouts) -> Handouts:
    return {turn: handouts[turn] for turns in stages for turn in turns}


def _line(node: Node | None) -> Iterator[Node]:
    """A node, what it reads, what that reads, ..."""
    while node is not None:
        yield node
        node = node.reads


class _Groups:
    """Union-find over nodes and evaluations."""

    def __init__(self, items: Iterable[object]) -> None:
        self.parent = {item: item for item in items}

    def of(self, item: object) -> object:
        while (parent := self.parent[item]) != item:
            item = parent
        return item

    def join(self, a: object, b: object) -> None:
        self.parent[self.of(a)] = self.of(b)
