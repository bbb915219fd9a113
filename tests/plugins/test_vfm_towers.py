"""Bare towers: every layout there and back, equal to timm's and open_clip's own networks, and a stack upon one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import run, write_stack
from torch import Tensor
from towers import CELLS, HIDDEN, SIDE, TWO, WIDTH, close, features, meta, normalised

from vtp_core.converting.conversion import Request, convert
from vtp_core.errors import DataFault, StackFault
from vtp_core.run.checkpoint import latest, load
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.importing import Mismatch
from vtp_vfm.towers import DINOV2, DINOV3, MAE

# ---- DINOv2 and DINOv3 against timm's own network, filled by timm's own reader


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_is_timms(registers: int, gated: bool) -> None:
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = meta(registers, gated)
    sections, tensors = DINOV2.to_ours(state, heads=4)
    name = f"vit_{'giant' if gated else 'small'}_patch14{'_reg4' if registers else ''}_dinov2"
    more = {"reg_tokens": registers} if registers else {}
    ratio = (2 if gated else 1) * HIDDEN / WIDTH
    theirs = timm.create_model(name, num_classes=0, mlp_ratio=ratio, **TWO, **more).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        close(features(sections, tensors, images), theirs.forward_features(normalised(images)), 1 + registers)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (False, False), (True, True), (True, False)])
def test_dinov3_is_timms(registers: int, gated: bool, biased: bool) -> None:
    import timm
    from timm.models.eva import checkpoint_filter_fn

    state = meta(registers, gated, three=True, biased=biased)
    sections, tensors = DINOV3.to_ours(state, heads=4)
    name = f"vit_small{'_plus' if gated else ''}_patch16_dinov3{'_qkvb' if biased else ''}"
    theirs = timm.create_model(
        name, num_classes=0, mlp_ratio=HIDDEN / WIDTH, num_reg_tokens=registers, **TWO
    ).eval()
    read = {"storage_tokens": torch.zeros(1), **state}  # by this key timm knows DINOv3
    found = checkpoint_filter_fn(read, theirs)
    if not registers:
        del found["reg_token"]
    theirs.load_state_dict(found)
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        close(features(sections, tensors, images), theirs.forward_features(normalised(images)), 1 + registers)


META = [
    (DINOV2, meta, {"registers": 0}),
    (DINOV2, meta, {"registers": 3}),
    (DINOV2, meta, {"registers": 3, "gated": True}),
    (DINOV3, meta, {"registers": 2, "three": True}),
    (DINOV3, meta, {"registers": 0, "three": True, "biased": False}),
    (DINOV3, meta, {"registers": 4, "three": True, "gated": True}),
]
LEFT = re.compile(r"mask_token|\.periods$|\.bias_mask$")


@pytest.mark.parametrize(("importer", "make", "shape"), META)
@pytest.mark.parametrize("wrapped", ["", "chunks"])
def test_meta_s_layouts_go_there_and_back_bit_by_bit(
    importer: Any, make: Any, shape: Any, wrapped: str
) -> None:
    state = make(**shape)
    given = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): v for k, v in state.items()} if wrapped else state
    if wrapped and importer is DINOV3:
        pytest.skip("DINOv3 is not stored in chunks")
    found = importer.convert(given, heads=None if importer is DINOV3 else 4)
    assert found.left == tuple(name for name in given if LEFT.search(name))
    back = importer.to_theirs(found.parts["tokenizer"], found.sections)
    assert back.keys() == {name for name in state if not LEFT.search(name)}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_registers_that_were_trained_further_keep_their_places() -> None:
    sections, tensors = DINOV2.to_ours(meta(3), heads=4)
    table = tensors["encoder.network.pos_embed"]
    table[:, 1:4] = torch.randn(1, 3, WIDTH)
    back = DINOV2.to_theirs(tensors, sections)
    again, _ = DINOV2.to_ours(back, heads=4), None
    images = torch.rand(1, 3, SIDE, SIDE)
    torch.testing.assert_close(
        features(*again, images)["patches"],
        features(sections, tensors, images)["patches"],
        rtol=1e-4,
        atol=1e-4,
    )


def test_constants_of_another_network_are_refused() -> None:
    state = meta(2, three=True)
    with pytest.raises(ValueError, match=r"rope_embed\.periods is not of base 100 and 2 heads"):
        DINOV3.convert(state, heads=2)
    assert DINOV3.to_ours(state)[0]["encoder"]["arguments"]["num_heads"] == 4
    state["blocks.1.attn.qkv.bias_mask"] = torch.ones(3 * WIDTH)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias: keys have a bias"):
        DINOV3.convert(state, heads=4)
    del state["blocks.1.attn.qkv.bias_mask"]
    DINOV3.convert(state, heads=4)  # zeros need no mask
    state["blocks.1.attn.qkv.bias"][WIDTH] = 1
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias: keys have a bias"):
        DINOV3.convert(state, heads=4)


PUBLISHED = [
    (DINOV2, "vit_small_patch14_dinov2", 6), (DINOV2, "vit_small_patch14_reg4_dinov2", 6),
    (DINOV3, "vit_small_plus_patch16_dinov3_qkvb", 6), (DINOV3, "vit_base_patch16_dinov3_qkvb", 12),
]  # fmt: skip
LARGE = [
    (DINOV2, "vit_large_patch14_reg4_dinov2", 16), (DINOV2, "vit_giant_patch14_reg4_dinov2", 24),
    (DINOV3, "vit_large_patch16_dinov3_qkvb", 16), (DINOV3, "vit_huge_plus_patch16_dinov3_qkvb", 20),
    (DINOV3, "vit_7b_patch16_dinov3", 32),
]  # fmt: skip


@pytest.mark.parametrize(
    ("importer", "name", "heads"), PUBLISHED + [pytest.param(*row, marks=pytest.mark.slow) for row in LARGE]
)
def test_published_sizes_are_told_by_their_shapes(importer: Any, name: str, heads: int) -> None:
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    state = {f"encoder.network.{k}": v for k, v in network.state_dict().items()}
    if "reg4" in name:  # places of registers, which timm's own has not
        table = state["encoder.network.pos_embed"]
        state["encoder.network.pos_embed"] = table.new_zeros(1, table.shape[1] + 5, table.shape[2])
    node: dict[str, Any] = {
        "name": name,
        "weights": "checkpoint",
        "image_size": 16 * network.patch_embed.patch_size[0],
    }
    if "reg4" in name:
        node["arguments"] = {"no_embed_class": False}
    state = importer.to_theirs(state, {"encoder": node})
    if importer is DINOV3:
        state["rope_embed.periods"] = torch.empty(network.embed_dim // heads // 4, device="meta")
    found = importer.convert(state)
    with pytest.raises(Mismatch):
        importer.convert(state | {"norm.bias": torch.empty(1)})
    state = {f"encoder.network.{k}": v for k, v in network.state_dict().items()}
    state |= {k: v for k, v in found.parts["tokenizer"].items() if "reg4" in name and k.endswith("pos_embed")}
    assert found.sections["encoder"]["name"] == name
    assert found.sections["encoder"]["arguments"]["num_heads"] == heads
    shapes = {k: v.shape for k, v in found.parts["tokenizer"].items()}
    assert shapes == {k: v.shape for k, v in state.items()}


# ---- a directory


def directory(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    state = meta(3)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, folder / "teacher.pth")
    return convert(Request("dinov2", folder / "teacher.pth", words=("heads=4",)), folder / "dir"), state


def test_a_tower_is_a_directory_with_features_and_no_decoder(tmp_path: Path) -> None:
    path, state = directory(tmp_path)
    tokenizer, images = Tokenizer.from_pretrained(path), torch.rand(2, 3, SIDE, SIDE)
    found = tokenizer.features(images)
    assert found.cls.shape == (2, WIDTH) and found.patches.shape == (2, CELLS, WIDTH) and found.grid == (4, 4)
    expected = features(*DINOV2.to_ours(state, heads=4), images)
    assert torch.equal(found.patches, expected["patches"])
    assert torch.equal(tokenizer.encode(images).flatten(2).transpose(1, 2), found.patches)
    with pytest.raises(StackFault, match="no decoder"):
        tokenizer.decode(tokenizer.encode(images))
    with pytest.raises(DataFault, match="no latent statistics"):
        tokenizer.encode(images, standardized=True)


STACK = """
modality: image
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
tokenizer: {from: DIR, frozen: [encoder]}
bottleneck: [{use: linear, channels: 8}]
decoder: {use: rae, width: 32, depth: 1, heads: 2}
teachers: {tower: {use: tokenizer, run: DIR}}
objectives:
  reconstruction: {weight: 1.0, lpips: 0.0}
  align: {to: tower, "on": latent, projector: linear, weight: 0.1}
train: {steps: 2, seed: 0}
"""


def test_a_stack_begins_from_a_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = directory(tmp_path)
    stack = write_stack(tmp_path, STACK.replace("DIR", str(path)))
    code, _, said = run(capsys, "train", str(stack), f"run.dir={tmp_path / 'run'}")
    assert code == 0, said
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run")
    trained = load(latest(tmp_path / "run" / "checkpoints"), verify=False)[0]["tokenizer"]  # type: ignore[arg-type]
    assert torch.equal(trained["encoder.network.cls_token"], state["cls_token"])
    image = torch.rand(1, 3, SIDE, SIDE)
    z = tokenizer.encode(image, standardized=True)
    assert z.shape == (1, 8, 4, 4) and tokenizer.decode(z, standardized=True).shape == image.shape


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("norm.bias"), r"1 tensor missing: norm\.bias \(32,\)"),
        (lambda s: s.update({"extra.weight": torch.ones(3)}), r"1 tensor unknown: extra\.weight \(3,\)"),
        (
            lambda s: s.update({"norm.bias": torch.ones(3)}),
            r"of another shape: norm\.bias \(3,\) for \(32,\)",
        ),
        (
            lambda s: s["blocks.1.attn.qkv.weight"].zero_(),
            r"all zero: tokenizer:encoder\.network\.blocks\.1\.attn\.qkv",
        ),
        (lambda s: s["norm.weight"].fill_(float("nan")), r"1 tensors are not finite: norm\.weight"),
    ],
)
def test_tensors_at_fault_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    state = meta(3)
    change(state)
    save_file(state, tmp_path / "tower.safetensors")
    with pytest.raises(DataFault, match=match):
        convert(Request("dinov2", tmp_path / "tower.safetensors", words=("heads=4",)), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_another_familys_file_is_told(tmp_path: Path) -> None:
    for importer, state in ((DINOV3, meta(3)), (DINOV2, meta(3, three=True)), (MAE, meta(3))):
        with pytest.raises(ValueError, match="these are not the tensors of"):
            importer.convert(state, heads=4)
    with pytest.raises(ValueError, match="heads: width 32 is not published"):
        DINOV2.convert(meta(0))
    sections, tensors = DINOV2.to_ours(meta(0), heads=4)
    tensors.popitem()
    with pytest.raises(Mismatch, match=r"encoder timm 'vit_small_patch14_dinov2'\n1 tensor missing"):
        DINOV2.to_theirs(tensors, sections)
