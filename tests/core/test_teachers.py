"""Frozen teachers: their own sizes and scales, weights from this machine only, and no gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small import STACK, write_stack
from torch import Tensor, nn

from vtp_core import Tokenizer, load_stack, train, weights
from vtp_core.errors import DataFault, StackFault
from vtp_core.nn import lite0
from vtp_core.teachers.frozen import Frozen, load_into
from vtp_core.teachers.lite0 import EfficientNetLite0
from vtp_core.teachers.open_clip import OpenCLIP
from vtp_core.teachers.timm import Timm
from vtp_core.teachers.tokenizer import Run
from vtp_plugins.spec import Spec

SPEC = Spec(size=(32, 32), patch=(8, 8), width=32, channels=8)
RANDOM: dict[str, Any] = {"weights": "random", "allow_random": True}
ALL = frozenset({"cls", "patches"})


def pictures(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size)


def meta(build: Any, **options: Any) -> Frozen:
    with torch.device("meta"):
        found: Frozen = build(SPEC, **options)
    return found


# ---- what all share


@pytest.mark.parametrize(
    ("build", "options", "width"),
    [
        (EfficientNetLite0, RANDOM, 112),
        (EfficientNetLite0, {**RANDOM, "block": 4}, 40),
        (Timm, {**RANDOM, "name": "test_vit"}, 64),
        (Timm, {**RANDOM, "name": "test_resnet"}, 96),
    ],
)
def test_a_teacher_has_the_tokenizers_tokens_and_stays_still(build: Any, options: Any, width: int) -> None:
    teacher = build(SPEC, **options).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    x = pictures().double().requires_grad_()
    found = teacher(x, want=ALL)
    assert set(found) == ALL
    assert (teacher.width, found["patches"].shape, found["cls"].shape) == (width, (2, 16, width), (2, width))
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    assert set(teacher(x, want=frozenset({"cls"}))) == {"cls"}
    assert teacher(pictures(48), want=ALL)["patches"].shape == (2, 36, width)  # a view of another size


def test_shapes_alone_need_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    for build, options in [(EfficientNetLite0, {}), (Timm, {"name": "vit_large_patch14_dinov2.lvd142m"})]:
        teacher = meta(build, **options)
        assert teacher(pictures().to("meta"), want=ALL)["patches"].shape == (2, 16, teacher.width)


@pytest.mark.parametrize(
    ("build", "options", "place"),
    [
        (EfficientNetLite0, {}, "weights/lite0.safetensors"),
        (
            Timm,
            {"name": "test_vit"},
            r"timm/test_vit\.r160_in1k\.safetensors(.|\n)*vtp weights import test_vit.r160",
        ),
        (OpenCLIP, {"name": "ViT-S-32-alt"}, "open_clip/ViT-S-32-alt.safetensors"),
        (
            OpenCLIP,
            {"name": "ViT-B-16.laion2b_s34b_b88k"},
            r"laion/CLIP-ViT-B-16-laion2B-s34B-b88K (.|\n)*vtp weights import ViT-B-16.laion2b_s34b_b88k --from",
        ),
        (Timm, {"name": "test_vit", "weights": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_missing_weights_are_a_fault_that_says_where_they_belong(
    build: Any, options: Any, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(DataFault, match=place):
        build(SPEC, **options)


@pytest.mark.parametrize(
    ("build", "options"),
    [(EfficientNetLite0, {}), (Timm, {"name": "test_vit"}), (OpenCLIP, {"name": "ViT-S-32-alt"})],
)
def test_random_weights_are_for_tests(build: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="allow_random: true"):
        build(SPEC, weights="random", **options)


def test_sounds_are_refused() -> None:
    with pytest.raises(ValueError, match="reads images"):
        EfficientNetLite0(Spec(modality="audio", size=(32,), patch=(8,)), **RANDOM)


# ---- EfficientNet-Lite0


def test_lite0_gives_the_real_networks_features() -> None:
    file = weights.path("lite0")
    x = pictures()
    teacher = EfficientNetLite0(SPEC, size=32)
    found = teacher(x, want=ALL)
    expected = lite0.load(file)(x)
    torch.testing.assert_close(found["cls"], expected, rtol=1e-4, atol=1e-5)
    assert found["patches"].shape == (2, 4, 112)
    large = F.interpolate(x, size=(64, 64), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        EfficientNetLite0(SPEC)(x, want=ALL)["cls"], lite0.load(file)(large), rtol=1e-4, atol=1e-5
    )


# ---- timm


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Weights of timm's smallest ViT with its classifier, as its hub has them."""
    import timm

    path = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


def vit(file: Path) -> Any:
    import timm
    from safetensors.torch import load_file

    network = timm.create_model("test_vit", pretrained=False)
    network.load_state_dict(load_file(file))
    return network.eval()


def test_timm_gives_its_final_tokens_without_prefix(file: Path) -> None:
    teacher, network = Timm(SPEC, name="test_vit", weights=str(file), size=160), vit(file)
    x = pictures(160)
    found = teacher(x, want=ALL | {"hidden:1"})
    with torch.no_grad():
        tokens = network.forward_features((x - 0.5) / 0.5)
    torch.testing.assert_close(found["patches"], tokens[:, 1:])
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    assert found["hidden:1"].shape == found["patches"].shape


def test_timm_resamples_the_position_table(file: Path) -> None:
    import timm
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    small = timm.create_model("test_vit", pretrained=False, img_size=64).eval()
    state = load_file(file)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (4, 4))
    small.load_state_dict(state)
    x = pictures()
    found = Timm(SPEC, name="test_vit", weights=str(file))(x, want=ALL)["patches"]
    large = F.interpolate(x, size=(64, 64), mode="bicubic", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(found, small.forward_features((large - 0.5) / 0.5)[:, 1:])


@pytest.mark.parametrize(("normalise", "shift", "scale"), [("signed", 0.5, 0.5), ("none", 0.0, 1.0)])
def test_va_vae_feeds_its_teacher_another_scale(
    normalise: Any, shift: float, scale: float, file: Path
) -> None:
    options: dict[str, Any] = {
        "name": "test_vit",
        "weights": str(file),
        "size": 32,
        "interpolation": "bilinear",
    }
    x = pictures()
    seen = Timm(SPEC, normalise=normalise, **options).prepared(x)
    torch.testing.assert_close(seen, (x - shift) / scale)


def test_a_state_dict_of_torch_is_read_without_running_code(file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = tmp_path / "vit.pth"
    torch.save({"state_dict": load_file(file)}, plain)
    x = pictures()
    options: dict[str, Any] = {"name": "test_vit"}
    a, b = (Timm(SPEC, weights=str(f), **options)(x, want=ALL)["cls"] for f in (file, plain))
    torch.testing.assert_close(a, b)
    torch.save(nn.Linear(2, 2), plain)
    with pytest.raises(DataFault, match="takes code to read; it was not run"):
        Timm(SPEC, weights=str(plain), **options)


def test_weights_of_another_model_are_a_fault(file: Path) -> None:
    with pytest.raises(DataFault, match="holds other weights than this model's"):
        Timm(SPEC, name="test_vit2", weights=str(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "vit_bas_patch16_224"}, "timm has no model.*did you mean 'vit_base_patch16_224"),
        ({"name": "test_vit.nobody_in1k"}, "nobody_in1k"),
        ({"name": "test_vit", "size": 40}, "40 is not a multiple of the teacher's patch of 16"),
    ],
)
def test_what_timm_cannot_build_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Timm(SPEC, **RANDOM, **options)


def test_outputs_that_a_teacher_lacks_are_named() -> None:
    with pytest.raises(StackFault, match="k from 1 to 6"):
        Timm(SPEC, name="test_vit", **RANDOM)(pictures(), want=frozenset({"hidden:7"}))
    with pytest.raises(StackFault, match="hidden:k is a ViT's"):
        Timm(SPEC, name="test_resnet", **RANDOM)(pictures(), want=frozenset({"hidden:1"}))
    with pytest.raises(StackFault, match="gives no 'latent'; it gives cls, patches"):
        EfficientNetLite0(SPEC, **RANDOM)(pictures(), want=frozenset({"latent"}))


# ---- open_clip


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    """A model of open_clip that is small enough for a test, registered by its own way."""
    import open_clip

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "vtp-tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "vtp-tiny-clip.json")
    return "vtp-tiny-clip"


def test_open_clip_gives_its_towers_tokens(tiny_clip: str, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(1)
    model = open_clip.create_model(tiny_clip, force_image_size=32).eval()
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    teacher = OpenCLIP(SPEC, name=tiny_clip, weights=str(tmp_path / "clip.safetensors"), size=32)
    x = pictures()
    found = teacher(x, want=ALL | {"hidden:1"})
    assert found["hidden:1"].shape == found["patches"].shape == (2, 16, 64)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (model.visual.image_mean, model.visual.image_std)
    )
    with torch.no_grad():
        expected = model.encode_image((x - mean) / std)
    torch.testing.assert_close(found["cls"] @ model.visual.proj.detach(), expected)
    resized = OpenCLIP(SPEC, name=tiny_clip, weights=str(tmp_path / "clip.safetensors"), size=64)
    assert resized(x, want=ALL)["patches"].shape == (2, 64, 64)
    load_into(nn.Linear(1, 1), _linear(tmp_path))
    with pytest.raises(DataFault, match="holds other weights"):
        OpenCLIP(SPEC, name=tiny_clip, weights=str(tmp_path / "linear.safetensors"))


def _linear(folder: Path) -> Path:
    save_file(nn.Linear(1, 1).state_dict(), folder / "linear.safetensors")
    return folder / "linear.safetensors"


def test_open_clip_downloads_nothing() -> None:
    with pytest.raises(ValueError, match="open_clip has no model 'hf-hub:someone/model'"):
        OpenCLIP(SPEC, name="hf-hub:someone/model", **RANDOM)
    with pytest.raises(ValueError, match="use the timm teacher"):
        OpenCLIP(SPEC, name="RN50", **RANDOM)


# ---- a run


def test_an_earlier_run_is_a_teacher(tmp_path: Path) -> None:
    text = STACK.replace("steps: 6", "steps: 1").replace("checkpoint_every: 2", "checkpoint_every: 1")
    start = text.index("  clip:")
    text = text[:start] + text[text.index("  reconstruction:") :].replace("rows: 0.25", "rows: 1.0")
    run = train(load_stack(str(write_stack(tmp_path, text)), [f"run.dir={tmp_path / 'run'}"]))
    teacher = Run(SPEC, run=str(run.path))
    x = pictures()
    found, features = teacher(x, want=ALL | {"hidden:1"}), Tokenizer.from_pretrained(run.path).features(x)
    torch.testing.assert_close(found["patches"], features.patches)
    torch.testing.assert_close(found["cls"], features.cls)
    assert found["hidden:1"].shape == (2, 16, 32)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert meta(Run, run=str(run.path))(x.to("meta"), want=ALL)["cls"].shape == (2, 32)
    with pytest.raises(DataFault):
        Run(SPEC, run=str(tmp_path / "nothing"))
