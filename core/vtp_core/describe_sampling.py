"""How a stack samples, in words: part of every number about its samples."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.reuse import Reuse
from vtp_core.stack import Stack
from vtp_core.validation import validated

DEFAULT: dict[str, Any] = {"use": "euler", "steps": 50}
"""The sampler of a stack that names none, for a generator with a path."""


def protocol_of(stack: Stack, weights: str) -> str:
    """Sampler, options, guidance, reuse and weights."""
    node: dict[str, Any] = stack.config.get("sampler") or (
        DEFAULT if (stack.config.get("generator") or {}).get("path") else {}
    )
    own = {k: v for k, v in node.items() if k not in {"use", "guidance", "reuse", "weak"}}
    said = [str(node.get("use", "")), *(f"{k} {v}" for k, v in own.items())]
    for key, model in (("guidance", Guidance), ("reuse", Reuse)):
        if node.get(key):  # as read, so that two ways to write one thing are one protocol
            keys: BaseModel = validated(model, f"sampler.{key}", node[key])
            named = {name: getattr(keys, name) for name in type(keys).model_fields if name in node[key]}
            said.append(f"{key} " + " ".join(f"{k} {_plain(v)}" for k, v in named.items()))
    said += [f"weak {node['weak']}"] if node.get("weak") else []
    return ", ".join([*said, f"{weights} weights"])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
