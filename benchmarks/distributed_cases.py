"""Stacks on a tiny vision transformer, one for every variant of every objective that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtp_plugins.clock import Clock
from vtp_plugins.registry import Registry

BATCH = 16
SGD = {"use": "sgd", "lr": 0.02, "betas": [0.9, 0.9], "warmup": 0, "schedule": "constant"}
BASE: dict[str, Any] = {
    "modality": "image",
    "encoder": {
        "use": "vit", "patch": 8, "image_size": 32, "width": 16, "depth": 3, "heads": 2, "drop_path": 0.2,
    },
    "bottleneck": [{"use": "linear", "channels": 4}, {"use": "noise", "tau": 0.2}],
    "decoder": {"use": "vit_pixels", "width": 16, "depth": 2, "heads": 2},
    "train": {"steps": 20, "max_grad_norm": 1.0, "teacher": {"momentum": [0.9, 1.0]}, "optim": SGD},
}  # fmt: skip
TEACHER = {"teachers": {"lite0": {"use": "efficientnet_lite0", "weights": "random", "allow_random": True}}}
HEAD: dict[str, Any] = {"prototypes": 24, "hidden": 16, "bottleneck": 8}
TEXT: dict[str, Any] = {
    "width": 16,
    "depth": 2,
    "heads": 2,
    "context": 16,
    "embedding": 8,
    "vocabulary": 600,
}
LPIPS: dict[str, Any] = {"lpips": 1.0, "trunk": "random", "allow_random_trunk": True}
PLAIN: dict[str, Any] = {"l1": 1.0, "l2": 1.0, "lpips": 0.0}
PATCH: dict[str, Any] = {"channels": 4, "layers": 2}
FEATURES: dict[str, Any] = {
    "discriminator": "features", "backbone": "random", "allow_random_backbone": True, "side": 32, "kernel": 3,
}  # fmt: skip
ALIGN: dict[str, Any] = {"to": "lite0", "hidden": 16, "resize": "bilinear"}
VF = {"mcos": {"margin": 0.1}, "mdms": {"scope": "pairs", "distance": "l1", "margin": 0.01}}


@dataclass(frozen=True)
class Case:
    """A stack whose gradients are held against those of one process.

    Attributes:
        name: ``objective: variant``.
        sections: of the stack, over :data:`BASE`.
        uneven: whether every second row of the global batch has ten times as many masked patches.
        batch: global.
    """

    name: str
    sections: Mapping[str, Any] = field(hash=False)
    uneven: bool = False
    batch: int = BATCH


@dataclass(frozen=True)
class Uneven:
    """Hides ten patches in even rows of the global batch and one in odd rows, at drawn places."""

    view: str = "global"
    most: int = 10

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        draws = clock.uniform("uneven", rows, crops, grid[0] * grid[1])
        counts = torch.where(clock.positions(rows) % 2 == 0, self.most, 1)
        hidden = draws.argsort(-1).argsort(-1).cpu() < counts[:, None, None]  # (R, K, N)
        return hidden.transpose(0, 1)


def cases() -> dict[str, Case]:
    """All of them by name; an objective without variants below is taken with its defaults."""
    found = [*_stacks()]
    variants = _variants()
    for name in Registry().names("objectives"):
        for what, sections in variants.get(name, {"defaults": {"objectives": {name: {}}, **TEACHER}}).items():
            found.append(Case(f"{name}: {what}", sections, uneven=name == "ibot" and "uneven" in what))
    return {case.name: case for case in found}


def _variants() -> dict[str, dict[str, dict[str, Any]]]:
    return {
        "align": _align(),
        "clip": _of(
            "clip", TEXT, softmax={}, sigmoid={"loss": "sigmoid"}, patches={"on": "patches"},
            latent={"on": "latent.cls", "loss": "sigmoid"},
        ),
        "dino": _of(
            "dino", {**HEAD, "local_crops": 2, "local_size": 16}, sinkhorn={},
            softmax={"centering": "softmax"}, latent={"on": "latent.cls"},
        ),
        "flow": _flow(),
        "gan": _gan(),
        "ibot": _of(
            "ibot", HEAD, sinkhorn={}, softmax={"centering": "softmax"}, **{
                "sinkhorn, uneven masks": {}, "softmax, uneven masks": {"centering": "softmax"},
                "latent, uneven masks": {"on": "latent"},
            },
        ),
        "kl": {
            reduction: {"bottleneck": {"use": "kl", "channels": 4}, "objectives": {
                "kl": {"reduction": reduction, "weight": 0.01}, "reconstruction": PLAIN}}
            for reduction in ("sum", "token", "mean")
        },
        "koleo": _of("koleo", {}, cls={}, latent={"on": "latent.cls"}),
        "reconstruction": _of(
            "reconstruction", {}, plain=PLAIN, lpips=LPIPS,
            summed={**LPIPS, "space": "signed", "reduction": "sum"},
        ),
    }  # fmt: skip


def _of(name: str, options: Mapping[str, Any], **variants: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {what: {"objectives": {name: {**options, **own}}} for what, own in variants.items()}


def _gan() -> dict[str, dict[str, Any]]:
    critics = {
        "batch norm": PATCH,
        "running statistics": {**PATCH, "statistics": "running", "loss": "lsgan"},
        "actnorm": {**PATCH, "norm": "actnorm"},
        "group norm, r1, lecam, diffaug": {
            **PATCH,
            "norm": "group",
            "r1": 1.0,
            "lecam": 0.1,
            "diffaug": 0.7,
            "loss": "vanilla",
        },
        "features": {**FEATURES, "diffaug": 1.0, "quantise": True},
        "features, batch norm": {**FEATURES, "norm": "batch", "saturates": False},
        "features, r1": {**FEATURES, "norm": "group", "r1": 0.5, "lecam": 0.3},
    }
    turns = {
        "before": {"order": "before"},
        "after, reuse": {"order": "after", "input": "reuse"},
        "after, fresh": {"order": "after", "input": "fresh"},
    }
    found = {}
    for what, options in critics.items():
        for when, turn in turns.items():
            if what in ("batch norm", "features") or when == "after, reuse":
                gan = {**options, "weight": 0.5, "critic": {**turn, "optim": SGD}}
                found[f"{what}, {when}"] = {"objectives": {"reconstruction": PLAIN, "gan": gan}}
    gan = {**PATCH, "norm": "group", "critic": {"optim": SGD}, "balance": {"against": "reconstruction"}}
    found["group norm, balanced"] = {"objectives": {"reconstruction": PLAIN, "gan": gan}}
    return found


def generator(use: str = "lightningdit", **options: Any) -> dict[str, Any]:
    """A tiny generator conditioned on labels."""
    sizes = {"width": 16, "depth": 3, "heads": 2}
    if use in {"ddt", "dit_dh"}:
        sizes = {
            "width": 16,
            "heads": 2,
            "encoder_blocks": 2,
            "head_blocks": 1,
            "head_width": 16,
            "head_heads": 2,
        }
    return {
        "use": use, **sizes, "patch": 1, "zero": False, "condition": "label", "drop_condition": 0.3,
        "path": {"use": "linear"}, **options,
    }  # fmt: skip


def _flow() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in Registry().names("generators"):
        found[name] = {"generator": generator(name), "objectives": {"flow": {"cosine": 1.0}}}
    ddpm = generator("dit", path={"use": "ddpm", "timesteps": 50})
    found["dit on ddpm, learned variance"] = {"generator": ddpm, "objectives": {"flow": {"vlb": 1.0}}}
    score = generator("sit", path={"use": "vp", "predicts": "score"})
    found["sit on vp, score"] = {"generator": score, "objectives": {"flow": {}}}
    found["lightningdit, latent not cut"] = {
        "generator": generator(path={"use": "gvp"}),
        "objectives": {"flow": {"cut": False, "weighting": "min_snr"}},
    }
    return found


def _align() -> dict[str, dict[str, Any]]:
    repa = {
        **ALIGN,
        "on": "hidden:2",
        "projector": "mlp3",
        "normalise": "spatial",
        "distance": "neg_cosine",
    }
    return {
        "patches": {**TEACHER, "objectives": {"align": {**ALIGN, "projector": "mlp3"}}},
        "va-vae's terms": {
            **TEACHER,
            "objectives": {
                "reconstruction": PLAIN,
                "align": {
                    **ALIGN, "on": "latent", "projector": "linear", "terms": VF,
                    "balance": {"against": "reconstruction", "at": "encoder.last", "max": 1e8},
                },
            },
        },
        "similarities of the batch": {
            **TEACHER,
            "objectives": {"align": {**ALIGN, "on": "latent", "scope": "batch", "distance": "l1"}},
        },
        "cls": {
            **TEACHER, "objectives": {"align": {**ALIGN, "on": "cls", "target": "cls", "projector": "linear"}}
        },
        "repa": {**TEACHER, "generator": generator(), "objectives": {"flow": {}, "align": repa}},
        "repa-e": {
            **TEACHER,
            "generator": generator(),
            "objectives": {
                "flow": {},
                "align": repa,
                "through": {**repa, "use": "align", "cut": [], "through": ["generator"], "mode": "eval"},
            },
        },
    }  # fmt: skip


FULL: dict[str, Any] = {
    "clip": {**TEXT, "weight": 1.0},
    "dino": {"weight": 0.8, "rows": 0.5, "head": "prototypes", "local_crops": 2, "local_size": 16},
    "ibot": {"weight": 0.9, "rows": 0.5, "head": "prototypes"},
    "koleo": {"weight": 0.1, "rows": 0.5},
    "reconstruction": {"weight": 0.3, "rows": 0.5, **LPIPS, "l2": 0.5},
}
"""VTP's five objectives, on sub-batches, with a head that two of them share."""
GAN: dict[str, Any] = {
    **FEATURES, "rows": 0.5, "balance": {"against": "reconstruction"}, "critic": {"optim": SGD},
}  # fmt: skip


def vtp(objectives: Mapping[str, Any] = FULL) -> dict[str, Any]:
    """Some or all of VTP's objectives as sections of a stack."""
    shared = any(keys.get("head") for keys in objectives.values())
    modules = {"modules": {"prototypes": {"use": "prototype_head", **HEAD}}} if shared else {}
    return {**modules, "objectives": dict(objectives)}


def _stacks() -> list[Case]:
    soft = {name: {"centering": "softmax"} for name in ("dino", "ibot")}
    uncoupled = {name: FULL[name] | soft.get(name, {}) for name in ("dino", "ibot", "reconstruction")}
    joint = {**FULL, "flow": {"rows": 0.5}}
    return [
        Case("vtp", vtp(), uneven=True, batch=2 * BATCH),
        Case("vtp with a gan", vtp({**FULL, "gan": GAN}), uneven=True, batch=2 * BATCH),
        Case("vtp with a generator", {**vtp(joint), "generator": generator()}, uneven=True, batch=2 * BATCH),
        Case("vtp without coupled objectives", vtp(uncoupled), uneven=True, batch=2 * BATCH),
    ]
