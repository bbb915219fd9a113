"""Our own components pass the kit that everybody gets."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest

from vtp_align import Align
from vtp_clip import Clip
from vtp_core.samplers.field import Field
from vtp_dino import DINO
from vtp_flow import DDPM, VP, Flow, Linear
from vtp_gan import GAN
from vtp_ibot import IBot
from vtp_koleo import KoLeo
from vtp_ldm import KL
from vtp_plugins import protocols
from vtp_plugins.spec import Spec
from vtp_plugins.testing import SPEC, check_objective
from vtp_reconstruction import Reconstruction

HEAD = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
TEXT = {"width": 16, "depth": 1, "heads": 2, "context": 16, "embedding": 8, "vocabulary": 1000}
RANDOM = {"trunk": "random", "allow_random_trunk": True}
TEACHER = {"to": "lite0", "projector": "mlp3", "hidden": 16}
VF = {"mcos": {"margin": 0.5}, "mdms": {"scope": "pairs", "distance": "l1", "margin": 0.25}}
CRITIC = {"channels": 4, "layers": 2}
FEATURES = {
    "discriminator": "features",
    "backbone": "random",
    "allow_random_backbone": True,
    "side": 32,
    "kernel": 3,
}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Align, {**TEACHER, "on": "patches"}),
        (Align, {**TEACHER, "on": "latent", "terms": VF}),
        (
            Align,
            {
                **TEACHER,
                "on": "hidden:2",
                "of": "generator",
                "normalise": "spatial",
                "distance": "neg_cosine",
            },
        ),
        (Align, {**TEACHER, "on": "cls", "target": "cls", "projector": "linear"}),
        (Align, {**TEACHER, "on": "latent", "projector": "none", "scope": "batch", "distance": "l1"}),
        (Clip, {**TEXT}),
        (Clip, {**TEXT, "loss": "sigmoid", "on": "latent"}),
        (DINO, {**HEAD}),
        (DINO, {**HEAD, "on": "latent.cls", "centering": "softmax", "local_crops": 0}),
        (GAN, {**CRITIC}),
        (GAN, {**CRITIC, "norm": "group", "loss": "lsgan", "r1": 1.0, "lecam": 0.1, "diffaug": 1.0}),
        (GAN, {**FEATURES, "loss": "vanilla", "quantise": True, "blur_until": 0.5}),
        (IBot, {**HEAD}),
        (IBot, {**HEAD, "on": "latent", "centering": "softmax"}),
        (KL, {}),
        (KL, {"reduction": "token", "half": False}),
        (KoLeo, {}),
        (KoLeo, {"on": "latent.cls"}),
        (Reconstruction, {"lpips": 0.0, "l2": 1.0}),
        (Reconstruction, {**RANDOM, "space": "pixel"}),
    ],
)
def test_a_first_party_objective_keeps_the_contract(cls: Any, options: dict[str, Any]) -> None:
    check_objective(cls, **options)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (Linear(SPEC), {"cosine": 1.0}),
        (Linear(SPEC), {"weighting": "min_snr", "cut": False}),
        (VP(SPEC, predicts="score"), {}),
        (DDPM(SPEC, timesteps=100), {"vlb": 1.0}),
    ],
)
def test_so_does_the_loss_of_a_generator_on_a_path(path: Any, options: dict[str, Any]) -> None:
    spec: Spec = replace(SPEC, path=path)
    check_objective(Flow, spec, **options)


@pytest.mark.parametrize("method", ["start", "predict", "velocity", "score"])
def test_the_field_that_samplers_get_has_the_contracts_signatures(method: str) -> None:
    told = inspect.signature(getattr(protocols.Field, method))
    assert inspect.signature(getattr(Field, method)) == told
