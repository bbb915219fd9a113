"""``--format diffusers``: ``config.json`` with the sections of our stack, one file of weights; needs no diffusers."""

from __future__ import annotations

import json
from typing import Any

from vtp_core.export import foreign_config
from vtp_core.export.card import card_of
from vtp_core.export.diffusers_reading import WEIGHTS, checked_model, shapes_of
from vtp_core.export.plan import Entries, Plan
from vtp_core.export.source import Source
from vtp_core.run.environment import masked
from vtp_core.stack import Stack
from vtp_core.statistics import hexed
from vtp_core.tokenizer import bare
from vtp_plugins.spec import Spec

CARD = "README.md"
_USE = """from vtp_core.integrations.diffusers import AutoencoderVTP

vae = AutoencoderVTP.from_pretrained("this directory")
z = vae.encode(images).latent  # images (B, 3, H, W) in [-1, 1]; {said}
x = vae.decode(z).sample"""


def diffusers_plan(source: Source, notes: list[str]) -> Plan:
    """What ``--format diffusers`` writes.

    Raises:
        StackFault: a tokenizer that is no autoencoder of images.
    """
    stack = bare(source.stack)
    spec = checked_model(stack).spec
    if left := [name for name in source.parts if name not in {"tokenizer", "statistics"}]:
        notes.append(f"left out, since an autoencoder has no place for it: {', '.join(left)}")
    config = _config(source, stack, spec)
    said = "z is standardised" if config["latents_mean"] else "z is raw, for there are no statistics"

    def texts(entries: Entries) -> dict[str, str]:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return {CARD: card_of(source, notes, _USE.format(said=said)), foreign_config.FILE: text}

    return Plan(WEIGHTS, {WEIGHTS: source.parts["tokenizer"]}, (CARD, foreign_config.FILE), texts, {})


def _config(source: Source, stack: Stack, spec: Spec) -> dict[str, Any]:
    statistics = source.parts.get("statistics", {})
    known = {key: statistics[key] for key in ("count", "of", "data") if key in statistics}
    latents = {key: int(value) if key == "count" else hexed(value) for key, value in known.items()}
    provenance = {
        "name": source.stack.name,
        "weights": source.weights,
        "step": source.step,
        "data": source.data,
        "latents": latents or None,
        "official": None if source.base is None else source.base.fields(),
    }
    return {
        "_class_name": foreign_config.CLASS,
        **shapes_of(spec),
        "stack": masked(stack.config),
        "scaling_factor": 1.0,
        "latents_mean": statistics["mean"].tolist() if statistics else None,
        "latents_std": statistics["std"].tolist() if statistics else None,
        "provenance": {key: value for key, value in provenance.items() if value is not None},
    }
