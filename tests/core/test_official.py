"""Parity with the VTP release; ``tests/golden/vtp/README.md`` describes the tensors and the tolerances.

Some variants travel with the repository; ``VTP_GOLDEN`` names a folder that holds them all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vtp_core.models.bottlenecks import Chain, Linear
from vtp_core.models.pixels import ViTPixels
from vtp_core.models.rope import Rope
from vtp_core.models.vit import ViT
from vtp_core.official import keys, stacks
from vtp_core.official.config import read_config
from vtp_plugins.spec import Spec

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden")) / "vtp"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/model.safetensors"))
SSL = sorted(path.parent.name for path in GOLDEN.glob("ssl_*/weights.safetensors"))


def off(ours: Tensor, theirs: Tensor) -> float:
    ours = ours.detach()
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-300))


class Model:
    """A golden variant, built with our modules."""

    def __init__(self, name: str, rope: str) -> None:
        folder = GOLDEN / name
        config = read_config(folder)
        self.state = load_file(folder / "model.safetensors")
        self.io = load_file(folder / "io.safetensors")
        self.grads = load_file(folder / "grads.safetensors")
        self.shared = not config.vision_bottleneck_ae_only
        self.pooled = config.vision_clip_feat == "pooled"
        options = stacks.tree_of(config, folder)
        for node in (options["encoder"], options["bottleneck"], options["decoder"]):
            del node["use"]
        if rope != "bfloat16":
            options["encoder"]["rope_dtype"] = options["decoder"]["rope_dtype"] = "float32"
        parts = keys.to_ours(self.state)
        self.encoder = ViT(Spec(), **options["encoder"]).eval()
        spec = Spec(width=self.encoder.width, patch=self.encoder.patch)
        self.bottleneck = Chain([Linear(spec, **options["bottleneck"])])
        spec = Spec(patch=self.encoder.patch, channels=self.bottleneck.channels)
        self.decoder = ViTPixels(spec, **options["decoder"]).eval()
        for part in ("encoder", "bottleneck", "decoder"):
            getattr(self, part).load_state_dict(parts[part])
        if rope == "stored":  # float32 rotation with the periods that the release rounds to bfloat16
            for module, tower in ((self.encoder, "trunk"), (self.decoder, "pixel_decoder")):
                module.rope.periods = self.state[f"{tower}.rope_embed.periods"].double()

    def latents(self, image: Tensor) -> Tensor:
        z = self.bottleneck(self.encoder(image)["patches"])["latent"]
        grid = self.encoder.grid_of(tuple(image.shape[2:]))
        return z.transpose(1, 2).unflatten(2, grid)

    def clip_raw(self, image: Tensor) -> Tensor:
        got = self.encoder(image)
        feature = got["patches"].mean(1) if self.pooled else got["cls"]
        if self.shared:
            feature = self.bottleneck(feature)["latent"]
        return F.linear(feature, self.state["visual_proj.weight"])

    def logits(self, image: Tensor) -> Tensor:
        raw = F.normalize(self.clip_raw(image), dim=-1) @ self.io["out.clip_text"].T
        return self.state["logit_scale"].exp() * raw + self.state.get("logit_bias", torch.zeros(()))

    def parameters(self) -> dict[str, Tensor]:
        parts = {p: dict(getattr(self, p).named_parameters()) for p in ("encoder", "bottleneck", "decoder")}
        return keys.from_ours(parts)

    def grads_of(self, loss: Tensor) -> dict[str, Tensor]:
        for part in (self.encoder, self.bottleneck, self.decoder):
            part.zero_grad()
        loss.backward()
        parts: dict[str, dict[str, Tensor]] = {}
        for part in ("encoder", "bottleneck", "decoder"):
            named = getattr(self, part).named_parameters()
            parts[part] = {key: value.grad for key, value in named if value.grad is not None}
        return keys.from_ours(parts)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: Any) -> Model:
    return Model(request.param, "bfloat16")


@pytest.fixture(scope="module", params=VARIANTS)
def twin(request: Any) -> Model:
    return Model(request.param, "stored")


@pytest.fixture(scope="module", params=VARIANTS)
def exact(request: Any) -> Model:
    return Model(request.param, "float32")


def test_the_map_to_our_names_has_an_inverse(model: Model) -> None:
    theirs = {k: v for k, v in model.state.items() if not k.endswith("periods")}
    back = keys.from_ours(keys.to_ours(model.state))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("shape", ["sq", "ns"])
@torch.no_grad()
def test_outputs_equal_the_release(model: Model, shape: str) -> None:
    io, image = model.io, model.io[f"in.image_{shape}"]
    got = model.encoder(image)
    bottleneck = model.bottleneck
    latents = model.latents(image)
    assert off(latents, io[f"out.{shape}.latents"]) < 1e-3
    assert off(model.decoder(latents)["decoded"], io[f"out.{shape}.decoded"]) < 1.5e-3
    assert off(got["cls"], io[f"out.{shape}.cls_token"]) < 1e-3
    assert off(got["patches"], io[f"out.{shape}.patch_tokens"]) < 1e-3
    assert off(bottleneck(got["cls"])["latent"], io[f"out.{shape}.cls_token_bottleneck"]) < 1.3e-3
    raw = model.clip_raw(image)
    assert off(raw, io[f"out.{shape}.clip_image_raw"]) < 1.3e-3
    assert off(F.normalize(raw, dim=-1), io[f"out.{shape}.clip_image"]) < 1.3e-3


@torch.no_grad()
def test_a_latent_of_any_shape_decodes_as_in_the_release(model: Model) -> None:
    decoded = model.decoder(model.io["in.latent_rand"])["decoded"]
    assert off(decoded, model.io["out.decoded_latent_rand"]) < 1.5e-3


@torch.no_grad()
def test_masked_patches_equal_the_release(model: Model) -> None:
    got = model.encoder(model.io["in.image_sq"], mask=model.io["in.mask_sq"])
    assert off(got["cls"], model.io["out.masked.cls"]) < 1.3e-3
    assert off(got["patches"], model.io["out.masked.patch"]) < 1e-3


@torch.no_grad()
def test_each_block_from_its_stored_input_equals_the_release(model: Model) -> None:
    io, grid = model.io, model.encoder.grid_of(tuple(model.io["in.image_ns"].shape[2:]))
    for tower, start, name, prefix in (
        (model.encoder, "out.ns.tokens_in", "out.ns.trunk_block", 1),
        (model.decoder, "out.ns.decoder_tokens_in", "out.ns.decoder_block", 0),
    ):
        x = io[start]
        for index, block in enumerate(tower.blocks):
            y = block(x, tower.rope.tables(grid, x, prefix))
            x = io[f"{name}{index}"]
            assert off(y, x) < 6e-4


@torch.no_grad()
def test_intermediate_tokens_equal_the_release(model: Model) -> None:
    io, image = model.io, model.io["in.image_ns"]
    last = f"hidden:{model.encoder.depth}"
    hidden = model.encoder(image, want={last: len(image)})[last]
    stored = io["out.ns.inter_last_unnormed_reshaped"].flatten(2).transpose(1, 2)
    assert off(hidden, stored) < 1e-3
    assert off(model.encoder.norm(hidden), io["out.ns.patch_tokens"]) < 1e-3


@pytest.mark.parametrize("shape", ["sq", "ns"])
def test_rotary_tables_are_exact(model: Model, shape: str) -> None:
    grid = model.encoder.grid_of(tuple(model.io[f"in.image_{shape}"].shape[2:]))
    tables = model.encoder.rope.tables(grid, torch.zeros(1))
    assert torch.equal(tables.cos, model.io[f"out.{shape}.rope_cos"])
    assert torch.equal(tables.sin, model.io[f"out.{shape}.rope_sin"])
    assert torch.equal(model.encoder.rope.periods, model.state["trunk.rope_embed.periods"])
    assert torch.equal(model.decoder.rope.periods, model.state["pixel_decoder.rope_embed.periods"])


def test_rotation_of_queries_and_keys_is_exact(model: Model) -> None:
    io = model.io
    grid = model.encoder.grid_of(tuple(io["in.image_ns"].shape[2:]))
    tables = model.encoder.rope.tables(grid, io["in.rope_q"], prefix=1)
    assert torch.equal(tables.rotate(io["in.rope_q"]), io["out.rope_q"])
    assert torch.equal(tables.rotate(io["in.rope_k"]), io["out.rope_k"])


def test_periods_of_the_release_have_sixteen_known_values() -> None:
    known = "1 1.3359375 1.78125 2.375 3.15625 4.21875 5.625 7.5 10 13.3125 17.75 23.75 31.625 42.25 56.25 75"
    assert Rope(64, 2, "bfloat16").periods.tolist() == [float(value) for value in known.split()]


@torch.no_grad()
def test_the_float32_twin_equals_the_reference_tightly(twin: Model) -> None:
    compare(twin, "out.rope32", decoded=True)


@torch.no_grad()
def test_exact_periods_equal_the_reference_tightly(exact: Model) -> None:
    compare(exact, "out.rope32exact", decoded=False)


def compare(model: Model, prefix: str, decoded: bool) -> None:
    io, image = model.io, model.io["in.image_ns"]
    latents = model.latents(image)
    assert off(latents, io[f"{prefix}.ns.latents"]) < 2e-5
    assert off(model.encoder(image)["cls"], io[f"{prefix}.ns.cls_token"]) < 2e-5
    assert off(F.normalize(model.clip_raw(image), dim=-1), io[f"{prefix}.ns.clip_image"]) < 2e-5
    masked = model.encoder(io["in.image_sq"], want={"cls": 3}, mask=io["in.mask_sq"])["cls"]
    assert off(masked, io[f"{prefix}.masked.cls"]) < 2e-5
    assert off(model.logits(io["in.image_sq"]), io[f"{prefix}.logits_per_image"]) < 2e-5
    if decoded:
        assert off(model.decoder(latents)["decoded"], io[f"{prefix}.ns.decoded"]) < 2e-5


def test_gradients_equal_the_release(model: Model) -> None:
    compare_gradients(model, "", complete=6e-3, norms=4e-3)


def test_gradients_of_the_float32_twin_equal_the_reference_tightly(twin: Model) -> None:
    compare_gradients(twin, "rope32.", complete=5e-5, norms=5e-5)


def compare_gradients(model: Model, prefix: str, complete: float, norms: float) -> None:
    image = model.io["in.image_sq"]
    decoded = model.decoder(model.latents(image))["decoded"]
    logits, target = model.logits(image), torch.arange(3)
    losses = {
        "rec": (decoded - image).square().mean(),
        "clip": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
    }
    ours = model.parameters().keys()
    for name, loss in losses.items():
        assert off(loss, model.grads[f"{prefix}out.{name}.loss"]) < complete
        grads = model.grads_of(loss)
        norm, whole = f"{prefix}gradnorm.{name}.", f"{prefix}grad.{name}."
        for key, value in model.grads.items():
            parameter = key.removeprefix(norm).removeprefix(whole)
            if key.startswith(norm) and parameter in ours:
                assert off(grads[parameter].double().norm(), value) < norms, key
            if key.startswith(whole) and parameter in ours:
                assert off(grads[parameter], value) < complete, key


@pytest.mark.parametrize("name", SSL)
@torch.no_grad()
def test_masked_student_tokens_equal_the_training_class(name: str) -> None:
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    state, io = load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")
    parts = keys.to_ours(state)
    options = {
        "width": config["D"],
        "depth": config["depth"],
        "heads": config["heads"],
        "qk_norm": config["qk"],
    }
    encoder = ViT(Spec(), **options, image_size=tuple(config["g"]), rope_dtype="bfloat16").eval()
    encoder.load_state_dict(parts["encoder"])
    crops = io["in.global_crops"]
    cls = encoder(crops, want={"cls": len(crops)}, mask=io["in.masks"])["cls"]
    if not config["ae_only"]:
        cls = F.linear(cls, parts["bottleneck"]["links.0.weight"])
    assert off(cls, io["out.student_global_cls_tokens"]) < 1.3e-3
