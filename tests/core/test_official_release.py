"""Code written for the release's class runs on a tokenizer of ours, with the release's values."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from test_official_reading import SMALL, off

from vtp_core.official.release import VTPModel


@pytest.fixture(scope="module")
def case() -> tuple[VTPModel, dict[str, torch.Tensor]]:
    return VTPModel.from_pretrained(SMALL), load_file(SMALL / "io.safetensors")


@torch.no_grad()
def test_the_methods_of_the_release_give_its_values(case: tuple[VTPModel, dict[str, torch.Tensor]]) -> None:
    model, io = case
    image, text = io["in.image_ns"], io["in.text"]
    latents = model.get_reconstruction_latents(image)
    assert off(latents, io["out.ns.latents"]) < 1e-3
    assert off(model.get_latents_decoded_images(latents), io["out.ns.decoded"]) < 1.5e-3
    for bottleneck, name in ((False, ""), (True, "_bottleneck")):
        found = model.get_last_layer_feature(image, use_bottleneck=bottleneck)
        assert off(found["cls_token"], io[f"out.ns.cls_token{name}"]) < 1e-3
        assert off(found["patch_tokens"], io[f"out.ns.patch_tokens{name}"]) < 1e-3
    assert off(model.get_clip_image_feature(image), io["out.ns.clip_image"]) < 1.3e-3
    assert off(model.get_clip_text_feature(text), io["out.clip_text"]) < 1e-5
    to_texts, to_images = model.get_clip_logits(io["in.image_sq"], text)
    assert off(to_texts, io["out.logits_per_image"]) < 8e-4
    assert off(to_images, io["out.logits_per_text"]) < 8e-4


@torch.no_grad()
def test_intermediate_layers_come_as_tokens_maps_and_pairs(
    case: tuple[VTPModel, dict[str, torch.Tensor]],
) -> None:
    model, io = case
    image = io["in.image_ns"]
    (patches, cls), *_ = model.get_intermediate_layers_feature(image, 1, return_class_token=True)
    assert (patches.ndim, cls.ndim) == (3, 2)
    (last,) = model.get_intermediate_layers_feature(image, 1, reshape=True, norm=False)
    assert off(last, io["out.ns.inter_last_unnormed_reshaped"]) < 1e-3
