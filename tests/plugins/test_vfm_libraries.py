"""Towers of other libraries: transformers', open_clip's and timm's, there and back and equal to the originals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from towers import CELLS, DEPTH, HIDDEN, PATCH, SIDE, TWO, WIDTH, close, features, meta, normalised

from vtp_plugins import Spec
from vtp_vfm import Timm
from vtp_vfm.towers import DINOV2, DINOV3, MAE, OPEN_CLIP, SIGLIP, TIMM

# ---- the layouts of transformers


def huggingface(
    importer: Any, gated: bool = False, registers: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tower in the layout of transformers, out of random tensors of ours."""
    layout = importer.layouts[-1]
    name = layout.tower.model(768, registers > 0) if not gated else "vit_giant_patch14_dinov2"
    arguments = TWO | {"mlp_ratio": (2 if gated else 1) * HIDDEN / WIDTH}
    arguments |= {"reg_tokens": registers, "no_embed_class": False} if registers else {}
    node = {"name": name, "weights": "random", "image_size": SIDE, "arguments": arguments}
    encoder = Timm(Spec(size=(0, 0)), **node)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = {f"encoder.{k}": v.detach() for k, v in encoder.state_dict().items()}
    if registers:
        tensors["encoder.network.pos_embed"][:, 1 : 1 + registers] = 0
    return importer.to_theirs(tensors, {"encoder": node}, layout=len(importer.layouts) - 1), node


@pytest.mark.parametrize(
    ("importer", "more", "others"),
    [
        (DINOV2, {}, {"embeddings.mask_token": (1, WIDTH)}),
        (DINOV2, {"registers": 4}, {"embeddings.mask_token": (1, WIDTH)}),
        (DINOV2, {"gated": True}, {}),
        (MAE, {}, {"pooler.dense.weight": (WIDTH, WIDTH)}),
        (SIGLIP, {}, {"head.probe": (1, 1, WIDTH)}),
    ],
)
def test_layouts_of_transformers_go_there_and_back(importer: Any, more: Any, others: dict[str, Any]) -> None:
    state, _ = huggingface(importer, **more)
    given = {f"vision_model.{k}": v for k, v in state.items()}
    beside = {f"vision_model.{k}": torch.ones(shape) for k, shape in others.items()} | {
        "logit_scale": torch.ones(1)
    }
    found = importer.convert({**given, **beside}, heads=4)
    assert set(found.left) == set(beside)
    back = importer.to_theirs(found.parts["tokenizer"], found.sections, layout=len(importer.layouts) - 1)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())
    assert any("norm" in name and not name.startswith(("encoder", "embed")) for name in back)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_dinov3_of_transformers_goes_there_and_back(gated: bool, biased: bool) -> None:
    sections, tensors = DINOV3.to_ours(meta(2, gated, three=True, biased=biased), heads=4)
    state = DINOV3.to_theirs(tensors, sections, layout=1)
    assert "layer.1.attention.k_proj.weight" in state and "layer.1.attention.k_proj.bias" not in state
    found = DINOV3.convert({**state, "embeddings.mask_token": torch.ones(1, 1, WIDTH)}, heads=4)
    assert found.sections == sections and found.left == ("embeddings.mask_token",)
    assert all(torch.equal(found.parts["tokenizer"][k], v) for k, v in tensors.items())
    back = DINOV3.to_theirs(found.parts["tokenizer"], sections, layout=1)
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


KINDS = [
    "dinov2", "dinov2_with_registers", "dinov2_swiglu", "dinov3", "dinov3_swiglu", "vit_mae", "siglip",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_towers_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    library = pytest.importorskip("transformers")
    shape = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "image_size": SIDE,
        "patch_size": PATCH, "attn_implementation": "eager",
    }  # fmt: skip
    if kind == "siglip":
        config = library.SiglipVisionConfig(intermediate_size=HIDDEN, **shape)
        theirs, importer, prefix = library.SiglipVisionModel(config), SIGLIP, 0
    elif kind == "vit_mae":
        config = library.ViTMAEConfig(intermediate_size=HIDDEN, mask_ratio=0.0, **shape)
        theirs, importer, prefix = library.ViTMAEModel(config), MAE, 1
    elif kind.startswith("dinov3"):
        shape |= {"intermediate_size": HIDDEN, "num_register_tokens": 2, "use_gated_mlp": "swiglu" in kind}
        shape |= {"hidden_act": "silu" if "swiglu" in kind else "gelu"}
        theirs, importer, prefix = library.DINOv3ViTModel(library.DINOv3ViTConfig(**shape)), DINOV3, 3
    else:
        shape |= {"mlp_ratio": 2, "use_swiglu_ffn": kind == "dinov2_swiglu"}
        if kind == "dinov2_with_registers":
            theirs = library.Dinov2WithRegistersModel(
                library.Dinov2WithRegistersConfig(num_register_tokens=3, **shape)
            )
        else:
            theirs = library.Dinov2Model(library.Dinov2Config(**shape))
        importer, prefix = DINOV2, 4 if kind == "dinov2_with_registers" else 1
    theirs = theirs.eval()
    for name, parameter in theirs.named_parameters():
        if kind != "vit_mae" or "position" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)  # in the published names, which its modules have no longer
    heads = importer.settings(json.loads((tmp_path / "config.json").read_text()))
    assert heads == {"heads": 4}
    sections, tensors = importer.to_ours(load_file(tmp_path / "model.safetensors"), **heads)
    images = torch.rand(2, 3, SIDE, SIDE)
    signal = 2 * images - 1 if kind == "siglip" else normalised(images)
    more = {"noise": torch.arange(CELLS).float().expand(2, -1)} if kind == "vit_mae" else {}
    with torch.no_grad():
        expected = theirs(signal, **more).last_hidden_state
    found = features(sections, tensors, images)
    torch.testing.assert_close(found["patches"], expected[:, prefix:], rtol=1e-4, atol=1e-4)
    if prefix:
        torch.testing.assert_close(found["cls"], expected[:, 0], rtol=1e-4, atol=1e-4)


# ---- open_clip and timm


def clip_model(folder: Path, name: str, vision: dict[str, Any], **more: Any) -> Any:
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIDE, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
        **more,
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return open_clip.create_model(name, load_weights=False).eval()


@pytest.mark.parametrize("quick", [False, True])
def test_a_tower_of_open_clip_is_its_own(tmp_path: Path, quick: bool) -> None:
    name = f"vtp-towers{'-quick' if quick else ''}"
    own = {"layers": DEPTH, "width": WIDTH, "head_width": 8, "patch_size": PATCH, "mlp_ratio": HIDDEN / WIDTH}
    model = clip_model(tmp_path, name, own, quick_gelu=quick)
    state = dict(model.state_dict())
    found = OPEN_CLIP.convert(state, name=name)
    sections, tensors = dict(found.sections), dict(found.parts["tokenizer"])
    assert {"logit_scale", "visual.proj"} <= set(found.left)
    images = torch.rand(2, 3, SIDE, SIDE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.visual.image_mean, model.visual.image_std))
    ours = features(sections, tensors, images)
    with torch.no_grad():
        model.visual.output_tokens = True
        pooled, tokens = model.visual((images - mean) / std)
        torch.testing.assert_close(ours["cls"] @ model.visual.proj, pooled, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["patches"], tokens, rtol=1e-4, atol=1e-4)
    back = OPEN_CLIP.to_theirs(tensors, sections, name)
    assert back.keys() == {k for k in state if k.startswith("visual.") and k != "visual.proj"}
    assert all(torch.equal(back[k], state[k]) for k in back)


def test_a_trunk_of_timm_in_open_clip_is_read_by_its_name(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none", "image_size": 160}
    model = clip_model(tmp_path, "vtp-towers-trunk", vision, embed_dim=64, custom_text=True)
    found = OPEN_CLIP.convert(dict(model.state_dict()), name="vtp-towers-trunk", image_size=32)
    images = torch.rand(1, 3, 32, 32)
    ours = features(dict(found.sections), dict(found.parts["tokenizer"]), images)
    assert ours["patches"].shape == (1, 4, 64)
    back = OPEN_CLIP.to_theirs(found.parts["tokenizer"], found.sections, "vtp-towers-trunk")
    assert all(torch.equal(back[k], model.state_dict()[k]) for k in back) and back


def test_what_open_clip_does_not_know_is_told(tmp_path: Path) -> None:
    for name, match in (
        ("ViT-B-16.openai", "want the activation of ViT-B-16-quickgelu"),
        ("ViT-B-17", "did you mean 'ViT-B-16'"),
        ("ViT-B-16.laion", "no weights 'laion' of ViT-B-16"),
        ("coca_ViT-B-32", "has attentional_pool"),
    ):
        with pytest.raises(ValueError, match=match):
            OPEN_CLIP.convert({}, name=name)


def test_timms_own_files_come_by_name() -> None:
    import timm

    network = timm.create_model("test_vit").eval()  # with a classifier
    state = dict(network.state_dict())
    found = TIMM.convert(state, name="test_vit", image_size=160)
    assert set(found.left) == {"head.weight", "head.bias"}
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        tokens = network.forward_features((images - 0.5) / 0.5)
    close(features(dict(found.sections), dict(found.parts["tokenizer"]), images), tokens, 1)
    back = TIMM.to_theirs(found.parts["tokenizer"], found.sections)
    assert back.keys() == state.keys() - set(found.left) and all(torch.equal(back[k], state[k]) for k in back)
    with pytest.raises(ValueError, match="timm has no model"):
        TIMM.convert(state, name="test_vitt")
