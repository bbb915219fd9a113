"""Our own objectives pass the kit that everybody gets."""

from __future__ import annotations

from typing import Any

import pytest

from vtp_clip import Clip
from vtp_dino import DINO
from vtp_ibot import IBot
from vtp_koleo import KoLeo
from vtp_plugins.testing import check_objective
from vtp_reconstruction import Reconstruction

HEAD = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
TEXT = {"width": 16, "depth": 1, "heads": 2, "context": 16, "embedding": 8, "vocabulary": 1000}
RANDOM = {"trunk": "random", "allow_random_trunk": True}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Clip, {**TEXT}),
        (Clip, {**TEXT, "loss": "sigmoid", "on": "latent"}),
        (DINO, {**HEAD}),
        (DINO, {**HEAD, "on": "latent.cls", "centering": "softmax", "local_crops": 0}),
        (IBot, {**HEAD}),
        (IBot, {**HEAD, "on": "latent", "centering": "softmax"}),
        (KoLeo, {}),
        (KoLeo, {"on": "latent.cls"}),
        (Reconstruction, {"lpips": 0.0, "l2": 1.0}),
        (Reconstruction, {**RANDOM, "space": "pixel"}),
    ],
)
def test_a_first_party_objective_keeps_the_contract(cls: Any, options: dict[str, Any]) -> None:
    check_objective(cls, **options)
