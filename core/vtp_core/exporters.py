"""Objectives of a tokenizer that export something: those trained with it, and those that travel along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core import options
from vtp_core.build import blueprint, objectives_only
from vtp_core.components import resolve
from vtp_core.errors import DataFault, Fault
from vtp_core.stack import Stack
from vtp_plugins.objective import Objective


def exporting(stack: Stack, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of those objectives that export something and are installed."""
    found = []
    for name, node in nodes.items():
        try:
            component = resolve(
                stack.registry, "objectives", f"objectives.{name}", node, stack.dial, _modules(stack),
                options.OBJECTIVE_KEYS,
            )  # fmt: skip
        except Fault:
            continue  # not installed here: the message of the missing method names it
        if component.cls.exports:
            found.append(name)
    return found


def exporters_of(
    stack: Stack, parts: Mapping[str, Mapping[str, Tensor]] | None, device: str | torch.device
) -> dict[str, Objective]:
    """Objectives that export something and are installed, trained here or by the run it started from.

    Args:
        stack: names them.
        parts: of a checkpoint; None leaves initial weights, where only shapes matter.
        device: where to put them.
    """
    own = _exporters(stack, stack.section("objectives"), stack.dial, parts, device)
    return {**travelled_exporters(stack, parts, device), **own}


def travelled_exporters(
    stack: Stack, parts: Mapping[str, Mapping[str, Tensor]] | None, device: str | torch.device
) -> dict[str, Objective]:
    """Those of them that only travel with the tokenizer; built by the dial of the run that trained them."""
    size = stack.tokenizer.size or stack.dial
    return _exporters(stack, stack.tokenizer.exports, size, parts, device)


def _exporters(
    stack: Stack, nodes: Mapping[str, Mapping[str, Any]], size: str,
    parts: Mapping[str, Mapping[str, Tensor]] | None, device: str | torch.device,
) -> dict[str, Objective]:  # fmt: skip
    kept = {name: nodes[name] for name in exporting(stack, nodes)}
    if not kept:
        return {}
    wanted = {"modality", "encoder", "bottleneck", "modules", "tokenizer"}
    config = {k: v for k, v in stack.config.items() if k in wanted} | {"size": size, "objectives": kept}
    model = objectives_only(blueprint(Stack(stack.name, config, stack.registry)))
    for name, objective in model.objectives.items():
        if parts is not None:
            tensors = parts.get(f"objectives/{name}", parts.get(f"exports/{name}"))
            if tensors is None:
                raise DataFault(f"the checkpoint has no weights of objectives.{name}")
            objective.load_state_dict(dict(tensors), strict=False)
        objective.to(device).eval().requires_grad_(False)
    return dict(model.objectives)


def _modules(stack: Stack) -> frozenset[str]:
    return frozenset(stack.section("modules"))
