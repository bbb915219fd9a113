"""What a stack takes from the run that ``tokenizer.from`` names: modules where it writes none, and exports."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vtp_core.options import OBJECTIVE_KEYS
from vtp_core.overrides import merged
from vtp_core.stack import load_run_stack
from vtp_plugins.registry import Registry

_BROUGHT = ("modality", "encoder", "bottleneck", "decoder")


def replaced(config: DictConfig, overrides: Sequence[str], registry: Registry) -> DictConfig:
    """A stack's file, with the modules of the run that an override ``tokenizer.from`` names in place of its own.

    A file that has a ``tokenizer`` of its own knows that it starts from something: what it writes stands. One that
    describes training from scratch can so be started from anything; overrides go on top of what is brought.

    Raises:
        DataFault: there is no run to start from.
    """
    if "tokenizer" in config:
        return config
    node = merged(copy.deepcopy(config), overrides).get("tokenizer")
    if not isinstance(node, Mapping) or not isinstance(node.get("from"), str):
        return config
    source = load_run_stack(Path(node["from"]), registry, check=False)
    for key in _BROUGHT:
        if key in source.config:
            config[key] = source.config[key]
    own = source.config.get("tokenizer") or {}
    OmegaConf.update(config, "tokenizer.size", own.get("size") or source.dial)
    return config


def inherited(tree: dict[Any, Any], registry: Registry) -> dict[Any, Any]:
    """The tree with the earlier run's modality, encoder, bottleneck and decoder where it writes none.

    ``tokenizer.size`` keeps the dial that those were built with, ``tokenizer.exports`` the earlier run's
    objectives that are not trained on, so that what they export travels on, and ``tokenizer.data`` its data.
    An objective that only travelled with the earlier tokenizer and is trained on now keeps its options but for
    those that are written.

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
    trained = _continued(tree.get("objectives"), own.get("exports") or {})
    kept = {name: options for name, options in exports.items() if name not in (tree.get("objectives") or {})}
    tokenizer.setdefault("exports", kept)
    seen = own.get("data") or source.config.get("data")
    if seen is not None:
        tokenizer.setdefault("data", seen)
    return {**tree, **brought, **trained, "tokenizer": tokenizer}


def _continued(objectives: Any, exports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``objectives`` with the options of those that so far travelled along; empty where the stack writes none.

    One that travelled with weight 0 is not to be trained: the stack's own begins anew.
    """
    if not isinstance(objectives, Mapping):
        return {}
    found = {}
    for name, node in objectives.items():
        written, kept = dict(node or {}), dict(exports.get(name, {}))
        same = written.get("use", name) == kept.get("use", name) and kept.get("weight") != 0
        options = {key: value for key, value in kept.items() if key not in OBJECTIVE_KEYS} if same else {}
        found[name] = {**options, **written} if isinstance(node, Mapping) else node
    return {"objectives": found}
