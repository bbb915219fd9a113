"""What kind of run a stack describes: whether it samples, guides, or goes on from an earlier tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODULES = ("encoder", "bottleneck", "decoder")


@dataclass(frozen=True, slots=True)
class Stage:
    """What the page asks of a stack.

    Attributes:
        generator: it trains one.
        guided: its sampler is guided.
        source: the run its tokenizer comes from; empty for one trained from nothing.
        weights: those taken from there, ``student`` or ``ema``.
        retrained: modules of that tokenizer that train on.
    """

    generator: bool = False
    guided: bool = False
    source: str = ""
    weights: str = "student"
    retrained: tuple[str, ...] = ()


def stage_of(stack: Mapping[str, Any]) -> Stage:
    """The stage of a resolved stack; that of an empty one is a tokenizer's, from nothing."""
    tokenizer = _mapping(stack, "tokenizer")
    guidance = _mapping(_mapping(stack, "sampler"), "guidance")
    source = tokenizer.get("from")
    frozen = tokenizer.get("frozen") or ()
    return Stage(
        generator=bool(stack.get("generator")),
        guided=guidance.get("scale", 1) != 1,
        source=source if isinstance(source, str) else "",
        weights=str(tokenizer.get("weights") or "student"),
        retrained=tuple(name for name in MODULES if source and name not in frozen),
    )


def _mapping(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}
