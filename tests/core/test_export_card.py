"""Model cards name the licences of all that took part: distributions, outside weights, and the weights themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import OFFICIAL, trained_run

from vtp_core.export.licences import VTP_LICENCE, licence_of, licences_of, outside_weights
from vtp_core.export.source import read_source
from vtp_core.export.writing import export
from vtp_core.stack import Stack, check_stack
from vtp_core.weights_table import TABLE
from vtp_core.weights_towers import TOWERS
from vtp_plugins.registry import Registry

DINO = "vit_small_patch14_dinov2.lvd142m"
CLIP = "ViT-B-32-quickgelu.openai"


def stack_of(**sections: object) -> Stack:
    tree = {"data": {"use": "emoji"}, "encoder": {"use": "vit"}, "decoder": {"use": "vit_pixels"}, **sections}
    return check_stack("mine", tree, Registry())


def test_outside_weights_that_took_part_are_told_with_their_places() -> None:
    stack = stack_of(
        objectives={
            "reconstruction": {"net": "vgg"},
            "finer": {"use": "reconstruction", "lpips": 0.5, "weight": 0.1},
            "plain": {"use": "reconstruction", "lpips": 0.0},
            "random": {"use": "reconstruction", "trunk": "random", "allow_random_trunk": True},
            "gan": {"discriminator": "features", "taps": [3]},
        },
        teachers={
            "small": {"use": "efficientnet_lite0"},
            "dino": {"use": "timm", "name": DINO},
            "clip": {"use": "open_clip", "name": CLIP},
            "none": {"use": "timm", "name": DINO, "weights": "random", "allow_random": True},
        },
    )
    assert outside_weights(stack) == {
        CLIP: ["teachers.clip"],
        "lite0": ["objectives.gan", "teachers.small"],
        "lpips-alex": ["objectives.finer"],
        "lpips-vgg": ["objectives.reconstruction"],
        DINO: ["teachers.dino"],
    }
    lines = licences_of(stack, released=False)
    assert f"weights lpips-vgg (objectives.reconstruction): {TABLE['lpips-vgg'].licence}" in lines
    assert f"weights {DINO} (teachers.dino): {TOWERS[DINO].licence}" in lines
    assert any(line.startswith("vtp-gan (gan): Apache-2.0") for line in lines)
    assert lines[-1].startswith("these weights: none is stated")


def test_an_encoder_made_of_outside_weights_is_told() -> None:
    encoder = {"use": "timm", "name": DINO, "weights": "checkpoint", "patch": 16, "image_size": 224}
    assert outside_weights(stack_of(encoder=encoder)) == {DINO: ["encoder"]}
    assert outside_weights(stack_of(encoder={**encoder, "weights": "random"})) == {}


@pytest.mark.parametrize("name", [*TABLE, *TOWERS])
def test_every_row_of_the_registry_has_a_licence(name: str) -> None:
    assert licence_of(name) not in {"", "not recorded", "unknown"}


def test_a_licence_that_nobody_knows_is_told_so() -> None:
    assert licence_of("no_such_network") == "not recorded"
    assert licence_of("vit_small_patch14_dinov2") == "apache-2.0"  # timm's default weights of a name


def test_what_is_not_installed_is_left_out_of_the_licences() -> None:
    config = {"encoder": {"use": "vit"}, "objectives": {"gone": {"use": "not_installed", "weight": 1.0}}}
    assert licences_of(Stack("mine", config, Registry()), released=True)[-1] == VTP_LICENCE


@pytest.mark.parametrize("format", ["native", "vtp", "diffusers"])
def test_the_card_of_every_format_has_them(tmp_path: Path, format: str) -> None:
    source = read_source(trained_run())
    export(trained_run(), tmp_path / "out", format)
    card = (tmp_path / "out" / "README.md").read_text()
    for line in licences_of(source.stack, released=False):
        assert line.replace("_", "\\_") in card, line
    export(OFFICIAL, tmp_path / "release", format)
    assert VTP_LICENCE in (tmp_path / "release" / "README.md").read_text()
