"""Licences that a model card names: of distributions, of outside weights that took part, of the weights."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vtp_core import options
from vtp_core.components import Component, resolve, schema_of
from vtp_core.errors import Fault
from vtp_core.stack import SINGLES, Stack, links_of
from vtp_core.weights_brought import find
from vtp_core.weights_table import TABLE

VTP_LICENCE = (
    "VTP's weights and code: MIT with one clause more: a product with over 100 M monthly active users or over "
    '30 M USD a year must visibly display "MiniMax VTP" (github.com/MiniMax-AI/VTP)'
)
_UNSTATED = "these weights: none is stated; it is for those who trained them to say"
_TAKEN = {
    "objectives": options.OBJECTIVE_KEYS,
    "generators": options.GENERATOR_KEYS,
    "samplers": options.SAMPLER_KEYS,
    "datasets": options.DATA_KEYS,
}
_TOKENIZER = {"encoders", "bottlenecks", "decoders"}


@dataclass(frozen=True, slots=True)
class _Node:
    """A component of a stack that people name."""

    kind: str
    key: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.options.get("use", self.key.rpartition(".")[2]))


def licences_of(stack: Stack, released: bool) -> list[str]:
    """Lines: what each installed distribution says of itself, then outside weights, then the weights.

    Args:
        stack: need not be checked; what is not installed is left out.
        released: whether the weights are those of the VTP release.
    """
    found: dict[str, set[str]] = {}
    for node in _nodes(stack):
        try:
            distribution = stack.registry.find(node.kind, node.name).distribution.partition(" ")[0]
        except Fault:
            continue
        found.setdefault(distribution, set()).add(node.name)
    lines = [f"{name} ({', '.join(sorted(used))}): {_said(name)}" for name, used in sorted(found.items())]
    lines += [
        f"weights {name} ({', '.join(keys)}): {licence_of(name)}"
        for name, keys in outside_weights(stack).items()
    ]
    return [*lines, VTP_LICENCE if released else _UNSTATED]


def outside_weights(stack: Stack) -> dict[str, list[str]]:
    """Names in the registry of outside weights -> places of the stack that read them, as far as these tell.

    A component tells by a static method ``outside_weights(options)``, where all its options are given.
    """
    found: dict[str, list[str]] = {}
    for node in _nodes(stack):
        component = _component(stack, node)
        tell = getattr(component.cls, "outside_weights", None) if component is not None else None
        if component is None or tell is None:
            continue
        fields = schema_of(component.cls)[0].model_fields
        whole = {name: field.default for name, field in fields.items()} | component.options
        for name in tell(whole):
            found.setdefault(str(name), []).append(node.key)
    return dict(sorted(found.items()))


def licence_of(name: str) -> str:
    """What the registry knows of outside weights."""
    if name in TABLE:
        return TABLE[name].licence
    row = find(name)
    return row.licence if row is not None else "not recorded"


def _component(stack: Stack, node: _Node) -> Component | None:
    taken = _TAKEN.get(node.kind, frozenset()) | options.COMPONENT_KEYS
    dial = stack.tokenizer.size or stack.dial if node.kind in _TOKENIZER else stack.dial
    modules = frozenset(stack.section("modules"))
    try:
        return resolve(stack.registry, node.kind, node.key, node.options, dial, modules, taken)
    except Fault:
        return None  # not installed here, so nobody knows


def _said(distribution: str) -> str:
    try:
        said = importlib.metadata.metadata(distribution).json
    except importlib.metadata.PackageNotFoundError:
        return "not stated"
    return str(said.get("license_expression") or said.get("license") or "not stated")


def _nodes(stack: Stack) -> Iterator[_Node]:
    places = [(kind, key, stack.config.get(key)) for key, kind in SINGLES.items()]
    places += [("bottlenecks", f"bottleneck[{i}]", link) for i, link in enumerate(links_of(stack.config))]
    places += [
        (kind, f"{kind}.{name}", node)
        for kind in ("objectives", "teachers", "modules")
        for name, node in stack.section(kind).items()
    ]
    places += [("objectives", f"objectives.{n}", node) for n, node in stack.tokenizer.exports.items()]
    places += [("datasets", "data", stack.tokenizer.data)]
    yield from (_Node(kind, key, node) for kind, key, node in places if isinstance(node, Mapping))
