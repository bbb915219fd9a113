"""What a stack takes from the run that ``tokenizer.from`` names: modules where it writes none, and exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtp_core.stack import load_run_stack
from vtp_plugins.registry import Registry

_BROUGHT = ("modality", "encoder", "bottleneck", "decoder")


def inherited(tree: dict[Any, Any], registry: Registry) -> dict[Any, Any]:
    """The tree with the earlier run's modality, encoder, bottleneck and decoder where it writes none.

    ``tokenizer.size`` keeps the dial that those were built with, ``tokenizer.exports`` the earlier run's
    objectives that are not trained on, so that what they export travels on, and ``tokenizer.data`` its data.

    Raises:
        DataFault: there is no run to start from.
    """
    node = tree.get("tokenizer")
    if not isinstance(node, Mapping) or not isinstance(node.get("from"), str):
        return tree
    source = load_run_stack(Path(node["from"]), registry, check=False)
    brought = {key: source.config[key] for key in _BROUGHT if key in source.config and key not in tree}
    own = source.config.get("tokenizer") or {}
    tokenizer = dict(node)
    if "encoder" in brought:
        tokenizer.setdefault("size", own.get("size") or source.dial)
    exports = {**(own.get("exports") or {}), **source.section("objectives")}
    kept = {name: options for name, options in exports.items() if name not in (tree.get("objectives") or {})}
    tokenizer.setdefault("exports", kept)
    seen = own.get("data") or source.config.get("data")
    if seen is not None:
        tokenizer.setdefault("data", seen)
    return {**tree, **brought, "tokenizer": tokenizer}
