"""A training step of VA-VAE, assembled from stacks alone, against values of the published code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rig import built, gradients, stack_of
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_core.state import load_tokenizer
from vtp_ldm import Gaussian
from vtp_ldm.importers import LDM
from vtp_plugins.spec import Spec

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden"))
Tensors = dict[str, Tensor]
Off = Callable[[Tensor, Tensor], float]


class Given:
    """A clock whose only draw is stored."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def normal(self, name: str, *shape: int) -> Tensor:
        assert self.noise.shape == shape
        return self.noise


class Drawn(Gaussian):
    """The bottleneck with a stored draw, in training as it is."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(Spec(width=8), channels=4)
        self.noise = noise

    def forward(self, x: Tensor, clock: Any = None) -> Any:
        return super().forward(x, None if clock is None else Given(self.noise))


def tokens(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)


def files(system: str, *names: str) -> list[Tensors]:
    found = [GOLDEN / system / f"{name}.safetensors" for name in names]
    for path in found:
        if not path.is_file():
            pytest.skip(f"{system}/{path.stem} does not travel with the repository; set VTP_GOLDEN")
    return [load_file(path) for path in found]


def objectives(changes: dict[str, Any], layers: int) -> dict[str, Any]:
    """VA-VAE's objectives as the plugin's README writes them, with a variant's changes by objective."""
    nodes: dict[str, Any] = {
        "reconstruction": {"space": "signed", "reduction": "sum", "lpips": 0.0},
        "kl": {"weight": 1e-6},
        "gan": {
            "weight": 0.5, "channels": 8, "layers": layers,
            "balance": {"against": "reconstruction", "at": "decoder.last"},
        },
        "align": {
            "to": "vfm", "on": "latent.sample", "projector": "linear", "weight": 0.1,
            "terms": {
                "mcos": {"distance": "cosine", "margin": 0.5},
                "mdms": {"distance": "l1", "margin": 0.25, "scope": "pairs"},
            },
            "balance": {"against": "reconstruction", "at": "encoder.last", "max": 1e8},
        },
    }  # fmt: skip
    return {name: {**node, **changes.get(name, {})} for name, node in nodes.items()}


def engine_with(changes: dict[str, Any], weights: Tensors, noise: Tensor, layers: int) -> Engine:
    sections, tensors = LDM.to_ours(weights, image_size=16)
    teachers = {"vfm": {"use": "judge", "width": 24}}
    stack = stack_of(objectives(changes, layers), modality="image", teachers=teachers, **sections)
    model: Any = built(stack)
    model.bottleneck.links[0] = Drawn(tokens(noise))
    load_tokenizer(model, tensors)
    others = LDM.others(weights)
    critic = {k.removeprefix("loss.discriminator."): v for k, v in others.items() if "discriminator" in k}
    model.objectives["gan"].critic.load_state_dict(critic)
    projection = others["linear_proj.weight"].flatten(1)
    model.objectives["align"].head.load_state_dict({"layers.0.weight": projection})
    return Engine(model, stack.train, 2, provided=frozenset({"teacher:vfm/patches"}))


def inputs(image: Tensor, feature: Tensor) -> Inputs:
    """Pictures in [-1, 1] and the teacher's map, as the loader hands them over."""
    return Inputs({"image": (image.double()[:, None] + 1) / 2}, {"teacher:vfm/patches": tokens(feature)})


def foreign(ours: str) -> str:
    """Their name of one of our gradients."""
    if ours.startswith("gan.critic."):
        return "loss.discriminator." + ours.removeprefix("gan.critic.")
    if ours == "align.head.layers.0.weight":
        return "linear_proj.weight"
    return LDM.layout.name(ours, 2)


def entries(row: dict[str, float]) -> dict[str, float]:
    """The reference's log of our row."""

    def sum_of(prefix: str) -> float:
        return sum(value for name, value in row.items() if name.startswith(prefix))

    found = {
        "total_loss": row["loss"], "kl_loss": row["kl/divergence"], "nll_loss": sum_of("reconstruction/"),
        "vf_loss": sum_of("align/"), "vf_weight": row["weight/align"],
    }  # fmt: skip
    if "gan/fooled" in row:
        found |= {
            "g_loss": row["gan/fooled"],
            "d_weight": row["weight/gan"],
            "disc_loss": sum_of("gan/critic_"),
        }
    return found


class Perceptual:
    """Stands in for LPIPS: the mean squared difference in [-1, 1], or a constant."""

    def __init__(self, constant: Tensor | None = None) -> None:
        self.constant = constant

    def __call__(self, decoded: Tensor, aim: Tensor) -> Tensor:
        if self.constant is not None:
            return self.constant.to(decoded).mean()
        deviation = decoded.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        return (2 * deviation * (decoded - aim)).square().mean()


MEANS = {"reconstruction": {"reduction": "mean"}, "kl": {"reduction": "mean", "half": False}}
MCOS = {"distance": "cosine", "margin": 0.5}
MDMS = {"distance": "l1", "margin": 0.25, "scope": "pairs"}
VARIANTS: dict[str, dict[str, Any]] = {
    "after_start": {},
    "before_start": {"gan": {"start": 10}},
    "no_margin": {"align": {"terms": {"mcos": {**MCOS, "margin": 0.0}, "mdms": {**MDMS, "margin": 0.0}}}},
    "cos_only": {"align": {"terms": {"mcos": MCOS}}},
    "distmat_only": {"align": {"terms": {"mdms": MDMS}}},
    "fixed_vf": {"align": {"balance": None}},
    "toy_perceptual": {},
    "pp_style": MEANS,
    "vanilla_disc": {"gan": {"loss": "vanilla"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_the_published_one(variant: str, off: Off) -> None:
    stored, weights = files("repa_vavae", "vavae", "vavae.weights")
    engine = engine_with(VARIANTS[variant], weights, stored["in.posterior_noise"], layers=2)
    if variant == "toy_perceptual":
        reconstruction: Any = engine.model.objectives["reconstruction"]
        reconstruction.lpips, reconstruction.perceptual = 1.0, Perceptual()
    grads, row = gradients(engine, inputs(stored["in.image"], stored["in.aux_feature"]))
    for name, value in entries(row).items():
        limit = 3e-5 if name.endswith("weight") else 1e-5
        assert value == pytest.approx(float(stored[f"out.{variant}.{name}"]), rel=limit), name
    seen = set()
    for ours, grad in grads.items():
        for turn in ("ae", "d"):
            name = f"{variant}.{turn}.{foreign(ours)}"
            if f"grad.{name}" in stored:
                assert off(grad, stored[f"grad.{name}"]) < 3e-5, ours
                seen.add(f"grad.{name}")
            if f"gradnorm.{name}" in stored:
                assert float(grad.norm()) == pytest.approx(float(stored[f"gradnorm.{name}"]), rel=3e-5), ours
                seen.add(f"gradnorm.{name}")
    expected = {name for name in stored if name.startswith((f"grad.{variant}.", f"gradnorm.{variant}."))}
    assert seen == expected and len(seen) >= 2
    if variant == "after_start":
        critic: Any = engine.model.objectives["gan"].critic
        for name, value in stored.items():
            if name.startswith("after."):
                key = name.removeprefix("after.loss.discriminator.")
                assert off(critic.state_dict()[key], value) < 1e-5


STEPS: dict[str, dict[str, Any]] = {
    "step0": {"gan": {"start": 10}},
    "step1": {},
    "step2": {},
    "fixed_vf": {"align": {"balance": None}},
    "no_margin": VARIANTS["no_margin"],
    "only_cos": VARIANTS["cos_only"],
    "only_distmat": VARIANTS["distmat_only"],
    "pp_style": MEANS,
}
ATOL = {
    "total_loss": 5e-3,
    "kl_loss": 2e-4,
    "nll_loss": 5e-3,
    "g_loss": 5e-6,
    "vf_loss": 5e-6,
    "disc_loss": 5e-6,
}
ATOL |= {"d_weight": 2e-3, "vf_weight": 2e-3}
GRADS = {"encoder.conv_out.weight": 5e-3, "decoder.conv_out.weight": 5e-3, "linear_proj.weight": 2e-5}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_with_a_given_perceptual_distance_is_the_published_one(step: str) -> None:
    stored, vae, weights, more = files("ldm_vae", "objective", "vae", "weights", "weights_loss")
    engine = engine_with(STEPS[step], {**weights, **more}, vae["in.noise"], layers=1)
    reconstruction: Any = engine.model.objectives["reconstruction"]
    reconstruction.lpips, reconstruction.perceptual = 1.0, Perceptual(stored["in.p_loss"])
    grads, row = gradients(engine, inputs(vae["in.image"], stored["in.aux_feature"]))
    limits = dict.fromkeys(ATOL, 5e-6) if step == "pp_style" else ATOL
    checked = 0
    for name, value in entries(row).items():
        if f"out.{step}.{name}" in stored:
            assert abs(value - float(stored[f"out.{step}.{name}"])) <= limits[name], name
            checked += 1
    by_name = {foreign(ours): grad for ours, grad in grads.items()}
    for name, limit in GRADS.items():
        if f"out.{step}.grad.{name}" in stored:
            grad = by_name[name].view(stored[f"out.{step}.grad.{name}"].shape)
            assert (grad - stored[f"out.{step}.grad.{name}"]).abs().max() <= limit, name
            checked += 1
    assert checked >= 1
