"""Towers that people bring: held against the network they are named after, and to what they were when they came."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import run
from torch import Tensor

from vtp_core import weights
from vtp_core.cli_weights import _data
from vtp_core.errors import DataFault, StackFault
from vtp_core.teachers.open_clip import OpenCLIP
from vtp_core.teachers.timm import Timm
from vtp_core.weights_files import pin_of, pinned
from vtp_core.weights_fitting import _network
from vtp_core.weights_towers import TOWERS
from vtp_plugins.importing import Mismatch
from vtp_plugins.spec import Spec

NAME = "test_vit.r160_in1k"  # timm's smallest, which no table has
SPEC = Spec(size=(32, 32), patch=(8, 8), width=32, channels=8)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VTP_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def drawn(name: str) -> dict[str, Tensor]:
    import timm

    torch.manual_seed(0)
    state: dict[str, Tensor] = timm.create_model(name, pretrained=False).state_dict()
    return state


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> Path:
    if name.endswith(".safetensors"):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


# ---- the table


@pytest.mark.parametrize("name", TOWERS)
def test_rows_say_what_their_library_says(name: str) -> None:
    row = TOWERS[name]
    if row.library == "timm":
        import timm

        found = timm.get_pretrained_cfg(name, allow_unregistered=False)
        assert found and (found.hf_hub_id, found.license) == (row.hub, row.licence)
        if row.original and found.url:
            assert found.url.endswith(f"/{row.original}")
    else:
        import open_clip

        model, _, tag = name.partition(".")
        assert open_clip.get_pretrained_cfg(model, tag)["hf_hub"] == f"{row.hub}/"
    if row.original:
        assert row.original.endswith(".pth") and len(row.original_sha256) in {8, 64}


def test_hashes_are_those_that_the_publisher_puts_into_the_name() -> None:
    named = {name: row for name, row in TOWERS.items() if "_dinov3" in name}
    assert len(named) == 6
    for row in named.values():
        assert row.original.removesuffix(".pth").endswith(row.original_sha256[:8])


def bytes_of(name: str) -> int:
    return sum(tensor.numel() * 4 for tensor in _network(TOWERS[name].library, name).state_dict().values())


SMALL = [
    "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m", "ViT-B-16.laion2b_s34b_b88k",
    "vit_small_plus_patch16_dinov3.lvd1689m", "vit_base_patch16_siglip_384.v2_webli", "vit_base_patch16_224.mae",
    "ViT-B-16-SigLIP2-256.webli",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_sizes_are_those_of_the_network(name: str) -> None:
    assert bytes_of(name) == TOWERS[name].size


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOWERS.keys() - set(SMALL)))
def test_sizes_of_all_the_others_too(name: str) -> None:
    assert bytes_of(name) == TOWERS[name].size


def test_the_page_has_every_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    rows = []
    for listed in weights.listing():
        data = _data(listed)
        digest = f"`{data['file_sha256'][:12]}`" if data["file_sha256"] else "not known"
        of = (
            f" of {data['from'] if '==' in data['from'] else 'torch-fidelity'}"
            if data["pinned_by"] == "table"
            else ""
        )
        size = f"{data['size'] / 1e6:,.1f} MB"
        rows.append(f"| `{listed.name}` | `{data['file']}`{of} | {digest} | {data['licence']} | {size} |")
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


# ---- coming and staying


def test_a_file_in_the_librarys_layout_is_kept_byte_by_byte(tmp_path: Path, home: Path) -> None:
    source = saved(tmp_path, drawn(NAME))
    for name in (NAME, "test_vit"):  # without a tag timm means its default
        file = weights.import_(name, source)
        assert (
            file == weights.path(name) == weights.tower("timm", name) == home / "timm" / f"{NAME}.safetensors"
        )
        assert file.read_bytes() == source.read_bytes()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert pinned(file) == digest
    assert subprocess.run(
        ["sha256sum", "-c", pin_of(file).name], cwd=file.parent, check=True, capture_output=True
    )
    row = next(row for row in weights.listing() if row.name == NAME)
    assert (row.state, row.sha256, row.pinned_by, row.entry.group) == ("ready", digest, "you", "others")
    source.unlink()
    assert weights.import_(NAME) == file and weights.verify()[NAME] == "ready"
    assert Timm(SPEC, name="test_vit").network.pos_embed.sum() == load_file(file)["pos_embed"].sum()
    assert sorted(p.name for p in file.parent.iterdir()) == [file.name, pin_of(file).name]


def test_another_file_in_its_place_is_refused(tmp_path: Path, home: Path) -> None:
    file = weights.import_(NAME, saved(tmp_path, drawn(NAME)))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    assert weights.verify(NAME) == {NAME: "broken"}
    with pytest.raises(
        DataFault, match=r"is not the one that was imported(.|\n)*vtp weights import test_vit"
    ):
        Timm(SPEC, name=NAME)
    pin_of(file).unlink()
    assert weights.verify() | {NAME: "unpinned"} == weights.verify()
    with pytest.raises(DataFault, match="were put there unchecked; vtp weights import"):
        weights.path(NAME)
    assert weights.import_(NAME) == file and weights.verify(NAME) == {NAME: "ready"}


def test_a_state_dict_of_torch_becomes_safetensors(tmp_path: Path) -> None:
    state = drawn(NAME)
    source = saved(tmp_path, {"state_dict": {f"module.{k}": v for k, v in state.items()}}, "model.pth")  # type: ignore[dict-item]
    found = load_file(weights.import_(NAME, source))
    assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


def test_a_classifier_may_lack(tmp_path: Path) -> None:
    headless = {k: v for k, v in drawn(NAME).items() if not k.startswith("head.")}
    weights.import_(NAME, saved(tmp_path, headless))
    Timm(SPEC, name=NAME)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("norm.bias"), r"1 tensor missing: norm\.bias \(64,\)"),
        (lambda s: s.update(extra=torch.ones(3)), r"1 tensor unknown: extra \(3,\)"),
        (
            lambda s: s.update({"norm.bias": torch.ones(3)}),
            r"of another shape: norm\.bias \(3,\) for \(64,\)",
        ),
        (lambda s: s.update(pos_embed=torch.ones(1, 5, 64)), r"of another shape: pos_embed \(1, 5, 64\) for"),
        (
            lambda s: s.update({"norm.bias": torch.ones(64).int()}),
            r"of another dtype: norm\.bias int32 for float32",
        ),
        (lambda s: s["norm.weight"].zero_(), r"1 tensor all zero: norm\.weight \(64,\)"),
        (lambda s: s["blocks.0.attn.qkv.weight"].zero_(), r"all zero: blocks\.0\.attn\.qkv\.weight"),
        (lambda s: s["norm.bias"].fill_(float("nan")), r"not finite: norm\.bias"),
    ],
)
def test_other_tensors_are_refused_in_a_table(tmp_path: Path, home: Path, change: Any, match: str) -> None:
    state = {name: tensor.clone() for name, tensor in drawn(NAME).items()}
    change(state)
    with pytest.raises(DataFault, match=match) as refused:
        weights.import_(NAME, saved(tmp_path, state))
    assert refused.value.code == 4 and not home.exists()


def test_zero_biases_are_no_fault(tmp_path: Path) -> None:
    state = {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in drawn(NAME).items()}
    weights.import_(NAME, saved(tmp_path, state))


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": drawn(NAME), "config": Evil(tmp_path)}, tmp_path / "model.pth")
    with pytest.raises(DataFault, match="takes code to read; it was not run"):
        weights.import_(NAME, tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_whose_name_has_another_hash_is_refused(tmp_path: Path, home: Path) -> None:
    for name, file in (
        (NAME, "model-deadbeef.pth"),
        ("vit_small_patch14_dinov2.lvd142m", "dinov2_vits14_pretrain.pth"),
        ("vit_7b_patch16_dinov3.lvd1689m", "dinov3_vit7b16_pretrain_lvd1689m-a955f4ea.pth"),
    ):
        with pytest.raises(DataFault, match=r"the published one begins with \w+: .*was not read"):
            weights.import_(name, saved(tmp_path, {"a": torch.ones(1)}, file))
    assert not home.exists()
    source = saved(tmp_path, drawn(NAME))
    true = source.rename(
        tmp_path / f"model-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}.safetensors"
    )
    weights.import_(NAME, true)


def test_names_that_nobody_knows_get_a_suggestion() -> None:
    with pytest.raises(StackFault, match=r"did you mean 'vit_base_patch14_dinov2\.lvd142m'"):
        weights.import_("vit_base_patch14_dinov2.lvd142", "x")
    with pytest.raises(DataFault, match="no package carries them"):
        weights.import_("resnet18")


# ---- the authors' layouts


def test_dinov2_comes_in_its_authors_layout(tmp_path: Path) -> None:
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    state = drawn(name)
    theirs = {k: v for k, v in state.items() if k not in {"reg_token", "cls_token", "pos_embed"}}
    theirs |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 384)}
    place = torch.randn(1, 1, 384)
    theirs |= {
        "pos_embed": torch.cat([place, state["pos_embed"]], 1),
        "cls_token": state["cls_token"] - place,
    }
    found = load_file(weights.import_(name, saved(tmp_path, theirs, "ours.pth")))
    assert found.keys() == state.keys()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in state.items())
    theirs["pos_embed"] = torch.randn(1, 257, 384)
    with pytest.raises(Mismatch, match="of another shape: pos_embed"):  # timm would resample it
        weights.import_(name, saved(tmp_path, theirs, "ours.pth"))


def test_dinov3_comes_in_its_authors_layout_but_not_without_its_biases(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3.lvd1689m"
    state = drawn(name)
    theirs = {
        k.replace("reg_token", "storage_tokens")
        .replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma"): v
        for k, v in state.items()
    }
    theirs |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    for index in range(12):
        theirs[f"blocks.{index}.attn.qkv.bias"] = torch.zeros(1152)
        theirs[f"blocks.{index}.attn.qkv.bias_mask"] = torch.ones(1152)
    found = load_file(weights.import_(name, saved(tmp_path, theirs, "ours.pth")))
    assert found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())
    theirs["blocks.3.attn.qkv.bias"][5] = 1.0
    with pytest.raises(Mismatch, match=r"the name with _qkvb has: blocks\.3\.attn\.qkv\.bias"):
        weights.import_(name, saved(tmp_path, theirs, "ours.pth"))


# ---- open_clip


@pytest.fixture
def tiny_clip(tmp_path: Path) -> str:
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_vit",
            "timm_pool": "token",
            "timm_proj": "none",
        },
        "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
        "custom_text": True,
    }
    (tmp_path / "vtp-tiny-trunk.json").write_text(json.dumps({**config, "embed_dim": 64}))
    open_clip.add_model_config(tmp_path / "vtp-tiny-trunk.json")
    return "vtp-tiny-trunk"


def test_both_towers_of_open_clip_are_checked_and_the_image_tower_teaches(
    tmp_path: Path, tiny_clip: str
) -> None:
    import open_clip

    model = open_clip.create_model(tiny_clip, load_weights=False)
    state = dict(model.state_dict())
    file = weights.import_(tiny_clip, saved(tmp_path, state))
    teacher = OpenCLIP(SPEC, name=tiny_clip, size=32, normalise="none")
    x = torch.rand(2, 3, 32, 32)
    found = teacher(x, want=frozenset({"cls", "patches", "hidden:1"}))
    expected = Timm(SPEC, name="test_vit", size=32, normalise="none", weights="random", allow_random=True)
    expected.network.load_state_dict({k[13:]: v for k, v in state.items() if k.startswith("visual.trunk.")})
    torch.testing.assert_close(found["patches"], expected(x, want=frozenset({"patches"}))["patches"])
    assert found["hidden:1"].shape == (2, 4, 64) and file.parent.name == "open_clip"
    del state["text.token_embedding.weight"]
    with pytest.raises(Mismatch, match=r"1 tensor missing: text\.token_embedding\.weight"):
        weights.import_(tiny_clip, saved(tmp_path, state))


def test_the_tag_of_the_weights_tells_mean_and_deviation() -> None:
    teacher = OpenCLIP(SPEC, name="ViT-B-16-SigLIP2-256.webli", size=32, weights="random", allow_random=True)
    assert teacher.mean.flatten().tolist() == [0.5] * 3  # CLIP's are 0.48, 0.46, 0.41
    with pytest.raises(
        ValueError, match="no weights 'laion2b_s32b' of ViT-L-14; did you mean 'laion2b_s32b_b82k'"
    ):
        OpenCLIP(SPEC, name="ViT-L-14.laion2b_s32b")


# ---- the commands


def test_the_list_says_file_hash_licence_size_and_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, said = run(capsys, "weights", "import", NAME, "--from", str(saved(tmp_path, drawn(NAME))))
    digest = pinned(Path(told.strip()))
    assert code == 0 and said == f"sha256 {digest}, pinned by you\n"
    code, told, _ = run(capsys, "weights", "list")
    assert code == 0
    lines = [line for line in told.splitlines() if line.startswith("  vit_base_patch14_dinov2")]
    assert lines[0].split() == [
        "vit_base_patch14_dinov2.lvd142m", "missing", "346.3", "MB", "0b8b82f85de9",
        "dinov2_vitb14_pretrain.pth,", "apache-2.0",
    ]  # fmt: skip
    assert f"  ready, pinned by you       1.5 MB  {str(digest)[:12]}  " in told
    code, told, _ = run(capsys, "weights", "list", "--json")
    rows = {row["name"]: row for row in json.loads(told)}
    assert rows[NAME]["sha256"] == digest and rows[NAME]["pinned_by"] == "you"
    assert rows["minilm"]["file_sha256"].startswith("53aa5117") and rows["minilm"]["licence"] == "Apache-2.0"
    assert rows["vit_7b_patch16_dinov3.lvd1689m"]["file_sha256"] == "a955f4ea"
    assert {"name", "file", "file_sha256", "licence", "size", "state", "path"} <= rows["lite0"].keys()
    assert run(capsys, "weights", "verify")[0] == 0
    assert run(capsys, "weights", "path", "ViT-B-16.laion2b_s34b_b88k")[0] == 4
