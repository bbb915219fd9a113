"""Path and sampler of every publication, in our noise level: sections of a stack (specs/generators.md 0.3, 0.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """How a network is trained and sampled from.

    Attributes:
        path: ``generator.path``.
        sampler: ``sampler``, guidance included.
    """

    path: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)

    def sections(self, generator: Mapping[str, Any]) -> dict[str, Any]:
        """``generator`` and ``sampler`` of a stack around a generator's own node."""
        node = {**generator, "path": dict(self.path), "condition": "label", "drop_condition": 0.1}
        return {"generator": node, "sampler": dict(self.sampler)}


_LOGIT_NORMAL = {"use": "linear", "law": "logit_normal"}

DIT = Setting(
    {"use": "ddpm"}, {"use": "ddpm", "steps": 250, "guidance": {"scale": 1.5, "channels": 3}}
)  # fmt: skip
SIT = Setting(
    {"use": "linear"},
    {"use": "euler_maruyama", "steps": 250, "diffusion": "sigma", "guidance": {"scale": 1.5, "channels": 3}},
)
REPA = Setting(
    {"use": "linear"},
    {
        "use": "euler_maruyama", "steps": 250, "diffusion": "sigma",
        "guidance": {"scale": 1.8, "interval": [0.0, 0.7]},
    },
)  # fmt: skip
LIGHTNINGDIT = Setting(
    _LOGIT_NORMAL,
    {
        "use": "euler", "steps": 249, "shift": 1 / 0.3,
        "guidance": {"scale": 6.7, "interval": [0.0, 0.875], "channels": 3},
    },
)  # fmt: skip
DDT = Setting(
    _LOGIT_NORMAL,
    {
        "use": "euler", "steps": 250, "last_step": 0.04,
        "guidance": {"scale": 2.0, "interval": [0.0, 0.7], "edges": "open"},
    },
)  # fmt: skip
RAE = Setting(
    {**_LOGIT_NORMAL, "shift": "from_latent", "within": [0.0, 0.999]},
    {"use": "euler", "steps": 49, "shift": "from_latent", "end": 0.001},
)
