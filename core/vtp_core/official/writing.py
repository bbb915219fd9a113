"""A tokenizer of ours in the VTP release's layout; what that layout cannot express is refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core import options
from vtp_core.build import blueprint
from vtp_core.components import Component, resolve
from vtp_core.errors import StackFault
from vtp_core.exporters import exporting
from vtp_core.models.bottlenecks import Linear
from vtp_core.models.pixels import ViTPixels
from vtp_core.models.rope import Rope
from vtp_core.models.vit import ViT
from vtp_core.official.config import MLP_RATIO, MODEL_TYPE, PATCH, Config
from vtp_core.official.keys import CLIP, from_ours
from vtp_core.official.layout import PERIODS, shapes
from vtp_core.official.stacks import ON
from vtp_core.stack import Stack
from vtp_core.tokenizer import bare

_SAID = ("architectures", "dtype", "torch_dtype", "transformers_version", "text_pad_id", "text_output_tokens",
         "nonscalar_logit_scale", "init_logit_scale")  # fmt: skip
"""Fields that say nothing of the modules, so that no stack holds them."""


def to_official(
    stack: Stack, parts: Mapping[str, Mapping[str, Tensor]], base: Config | None = None
) -> tuple[Config, dict[str, Tensor]]:
    """Config and tensors of the release's class, by its names: float32, periods bfloat16 (specs/vtp.md 2).

    Args:
        stack: of the tokenizer.
        parts: ``tokenizer``, and ``objectives/NAME`` or ``exports/NAME`` of its CLIP objective.
        base: config of the directory that the tokenizer came from, for fields that the stack does not hold.

    Raises:
        StackFault: modules or options that the layout has no place for, each by its key.
    """
    wrong: list[str] = []
    fields = {**_trunk(stack, wrong), **_clip(stack, wrong)}
    if wrong:
        raise StackFault("\n".join(["the vtp layout cannot express", *(f"  {line}" for line in wrong)]))
    if base is not None and base.init_logit_bias is not None and "init_logit_bias" in fields:
        fields |= {key: getattr(base, key) for key in ("init_logit_scale", "init_logit_bias")}
    config = Config(model_type=MODEL_TYPE, **{**_said(base, fields), **fields})
    state = from_ours(_by_part(stack, parts), (1,) if config.nonscalar_logit_scale else ())
    state = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()}
    for tower, prefix in (("trunk", "vision"), ("pixel_decoder", "decoder")):
        if tower == "trunk" or config.train_reconstruction:
            width, heads = (getattr(config, f"{prefix}_{key}") for key in ("embed_dim", "num_heads"))
            state[f"{tower}.{PERIODS}"] = Rope(width // heads, 2, "bfloat16").periods
    wanted = shapes(config)
    off = sorted(
        n for n in wanted.keys() | state.keys() if n not in state or tuple(state[n].shape) != wanted.get(n)
    )
    if off:
        raise StackFault(f"the vtp layout has no place for, or lacks, {', '.join(off[:6])}")
    return config, state


def _by_part(stack: Stack, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in parts["tokenizer"].items():
        owner, _, name = key.partition(".")
        found.setdefault(owner, {})[name] = value
    for name in _clips(stack):
        part = parts.get(f"objectives/{name}", parts.get(f"exports/{name}"))
        if part is None:
            raise StackFault(f"objectives.{name}: the checkpoint has no weights of it")
        found[CLIP] = dict(part)
    return found


def _said(base: Config | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the directory that the tokenizer came from, where the stack has nothing to say."""
    if base is None:
        return {"architectures": ["VTPModel"], "dtype": "float32"}
    known = base.model_dump(exclude={"model_type"})
    kept = {key: value for key, value in known.items() if key in _SAID}
    absent = [p for p, f in (("text", "train_clip"), ("decoder", "train_reconstruction")) if not fields[f]]
    kept |= {key: value for key, value in known.items() if key.partition("_")[0] in absent}
    return kept | {key: known[key] for key in ("vision_bottleneck_ae_only", "vision_clip_feat")}


# ---- what the stack says


def _trunk(stack: Stack, wrong: list[str]) -> dict[str, Any]:
    """Fields of encoder, bottleneck and decoder; what has no field is added to ``wrong``."""
    plans = blueprint(bare(stack))
    if plans.modality.name != "image":
        wrong.append(f"modality: {plans.modality.name}; it has images alone")
    encoder, decoder = plans.encoder, plans.decoder
    if encoder is None or encoder.cls is not ViT:
        wrong.append(f"encoder: {encoder.name if encoder else None}; it has vit alone")
        return {"train_reconstruction": decoder is not None}
    own = settings(encoder)
    patch, size = (_one(f"encoder.{key}", own[key], wrong) for key in ("patch", "image_size"))
    fields = {
        "image_size": size, "vision_patch_size": patch, "vision_mlp_ratio": own["mlp_ratio"],
        "rope_dtype": own["rope_dtype"], "train_reconstruction": decoder is not None,
        "vision_feature_bottleneck": _links(plans.links, own["width"], wrong), **_tower("vision", own),
    }  # fmt: skip
    if decoder is None:
        return fields
    if decoder.cls is not ViTPixels:
        wrong.append(f"decoder: {decoder.name}; it has vit_pixels alone")
        return fields
    theirs = settings(decoder)
    if patch != PATCH:
        wrong.append(f"encoder.patch: {patch}; its decoder draws {PATCH} pixels a token")
    if theirs["mlp_ratio"] != MLP_RATIO:
        wrong.append(f"decoder.mlp_ratio: {theirs['mlp_ratio']}; its decoder's is {MLP_RATIO}")
    if theirs["rope_dtype"] != own["rope_dtype"]:
        wrong.append(
            f"decoder.rope_dtype: {theirs['rope_dtype']}, but encoder.rope_dtype: {own['rope_dtype']}"
        )
    return fields | _tower("decoder", theirs)


def _tower(prefix: str, own: Mapping[str, Any]) -> dict[str, Any]:
    names = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "ffn_layer": "ffn", "norm_layer": "norm",
             "use_qk_norm": "qk_norm"}  # fmt: skip
    fields = {f"{prefix}_{theirs}": own[ours] for theirs, ours in names.items()}
    return {**fields, f"{prefix}_init_values": own["layer_scale"] or None}


def _one(key: str, value: Any, wrong: list[str]) -> int:
    """One number for both axes."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        wrong.append(f"{key}: {value}; it has one number for both sides")
    return int(next(iter(sides)))


def _links(links: list[Component], width: int, wrong: list[str]) -> int:
    """Channels of the bottleneck: of one matrix without bias, or the encoder's own where there is no link."""
    for index, link in enumerate(links):
        if link.cls is not Linear or index:
            wrong.append(f"bottleneck[{index}]: {link.name}; it has one linear link")
        elif settings(link)["bias"]:
            wrong.append(f"bottleneck[{index}].bias: its matrix has no bias")
        elif settings(link)["channels"] == width:
            wrong.append(
                f"bottleneck[{index}].channels: {width}; it has no matrix of the encoder's own width"
            )
    return int(settings(links[0]).get("channels", width)) if links else width


def _nodes(stack: Stack) -> dict[str, dict[str, Any]]:
    return {**stack.tokenizer.exports, **stack.section("objectives")}


def _clips(stack: Stack) -> list[str]:
    return [name for name, node in _nodes(stack).items() if node.get("use", name) == CLIP]


def _clip(stack: Stack, wrong: list[str]) -> dict[str, Any]:
    """Fields of the text tower and of what it is compared with."""
    nodes, names = _nodes(stack), _clips(stack)
    others = [name for name in exporting(stack, nodes) if name not in names]
    wrong += [f"objectives.{name}: what it exports; it has {CLIP} alone" for name in [*others, *names[1:]]]
    if not names:
        return {"train_clip": False}
    key = f"objectives.{names[0]}"
    node = {"use": CLIP, **nodes[names[0]]}
    dial = stack.dial if names[0] in stack.section("objectives") else stack.tokenizer.size or stack.dial
    modules = frozenset(stack.section("modules"))
    own = settings(resolve(stack.registry, "objectives", key, node, dial, modules, options.OBJECTIVE_KEYS))
    if own["width"] != own["embedding"]:
        wrong.append(f"{key}.embedding: {own['embedding']}; it is the text tower's width, {own['width']}")
    read = {on: said for said, on in ON.items()}[own["on"]]
    sigmoid = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if own["loss"] == "sigmoid" else {}
    names_of = {"embed_dim": "width", "depth": "depth", "num_heads": "heads", "context_length": "context",
                "vocab_size": "vocabulary", "mlp_ratio": "mlp_ratio", "quick_gelu": "quick_gelu",
                "proj_bias": "projection_bias"}  # fmt: skip
    return {
        "train_clip": True, "vision_clip_feat": read[0], "vision_bottleneck_ae_only": read[1],
        **{f"text_{theirs}": own[ours] for theirs, ours in names_of.items()},
        "text_ls_init_value": own["layer_scale"] or None, **sigmoid,
    }  # fmt: skip


def settings(component: Component) -> dict[str, Any]:
    """All options of a component, defaults included."""
    parameters = inspect.signature(component.cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {**defaults, **component.options}
