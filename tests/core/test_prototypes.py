"""The prototype head against DINOv2's, DINOv3's and the VTP training class's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.nn.prototypes import PrototypeHead
from vtp_plugins import Spec

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS: dict[str, dict[str, Any]] = {
    "head_v2": {"layers": 3},
    "head_v2_1layer": {"layers": 1},
    "head_v2_bn_2layer": {"layers": 2, "batch_norm": True, "bias": False},
    "head_v3": {"layers": 3, "weight_norm": False},
}


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.detach().double() - stored.double()).norm() / stored.double().norm())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_equals_its_reference_with_all_gradients(name: str) -> None:
    stored = load_file(GOLDEN / "dinov2_losses" / f"{name}.safetensors")
    head = PrototypeHead(Spec(width=32), prototypes=64, hidden=48, bottleneck=24, **HEADS[name])
    head.load_state_dict(load_file(GOLDEN / "dinov2_losses" / f"{name}.weights.safetensors"))
    x = stored["in.x"].requires_grad_()
    scores = head(x)
    (scores * stored["in.cotangent"]).sum().backward()
    assert off(scores, stored["out.logits"]) < 1e-5
    assert off(x.grad, stored["grad.x"]) < 1e-5
    for key, parameter in head.named_parameters():
        assert off(parameter.grad, stored[f"grad.{key}"]) < 1e-5, key
    for key, buffer in head.named_buffers():
        torch.testing.assert_close(buffer, stored[f"after.{key}"])
    if not HEADS[name].get("batch_norm"):
        assert off(head.features(x), stored["out.l2_normalised_bottleneck"]) < 1e-5


@pytest.mark.parametrize(("name", "layers"), [("ssl_ae_only", 3), ("ssl_shared", 2)])
def test_the_head_of_the_vtp_training_class_loads_and_agrees(name: str, layers: int) -> None:
    stored = load_file(GOLDEN / "vtp" / name / "io.safetensors")
    weights = load_file(GOLDEN / "vtp" / name / "weights.safetensors")
    own = {k.removeprefix("dino_head."): v for k, v in weights.items() if k.startswith("dino_head.")}
    prototypes, bottleneck = own["last_layer.weight_v"].shape
    hidden, width = own["mlp.0.weight"].shape
    sizes = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck, "layers": layers}
    head = PrototypeHead(Spec(width=99, channels=width), on="latent.cls", **sizes)
    head.load_state_dict(own)
    scores = head(stored["out.student_global_cls_tokens"])
    assert off(scores, stored["out.student_global_cls_tokens_after_head"]) < 1e-5


def test_prototypes_start_at_length_one_and_features_lie_on_the_sphere() -> None:
    head = PrototypeHead(Spec(width=8), **PrototypeHead.sizes["tiny"])
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(1024))
    torch.testing.assert_close(head.features(torch.randn(2, 3, 8)).norm(dim=-1), torch.ones(2, 3))


def test_features_are_float32_under_autocast() -> None:
    head = PrototypeHead(Spec(width=8), prototypes=16, hidden=8, bottleneck=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.features(torch.randn(2, 8)).dtype == torch.float32
