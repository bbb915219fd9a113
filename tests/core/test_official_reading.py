"""VTP directories: read through the public surface, equal to the release, and nothing broken is believed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import run, write_stack
from torch import Tensor

from vtp_core import Tokenizer, load_stack, train
from vtp_core.errors import DataFault, StackFault
from vtp_core.official.hub import is_id
from vtp_core.official.reading import read_official

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden")) / "vtp"
VARIANTS = sorted(path.parent for path in GOLDEN.glob("*/model.safetensors"))
SMALL = GOLDEN / "qknorm_shared"
SHARED = {"vision_bottleneck_ae_only": False}


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda path: path.name)
def case(request: Any) -> tuple[Tokenizer, dict[str, Tensor]]:
    return Tokenizer.from_pretrained(request.param), load_file(request.param / "io.safetensors")


@pytest.mark.parametrize("shape", ["sq", "ns"])
@torch.no_grad()
def test_a_directory_of_the_release_is_a_tokenizer(case: tuple[Tokenizer, Any], shape: str) -> None:
    tok, io = case
    out = {
        key.removeprefix(f"out.{shape}."): value
        for key, value in io.items()
        if key.startswith(f"out.{shape}.")
    }
    images = tok.modality.to_display(io[f"in.image_{shape}"])
    z = tok.encode(images)
    assert off(z, out["latents"]) < 1e-3
    assert off(tok.modality.normalise(tok.decode(z)), out["decoded"]) < 1.5e-3
    features = tok.features(images)
    assert off(features.cls, out["cls_token"]) < 1e-3
    assert off(features.patches, out["patch_tokens"]) < 1e-3
    assert features.grid == tuple(z.shape[2:])
    assert off(tok.embed_image(images), out["clip_image"]) < 1.3e-3


@torch.no_grad()
def test_embeddings_of_texts_and_logits_equal_the_release(case: tuple[Tokenizer, Any]) -> None:
    tok, io = case
    clip: Any = tok._exporter("embed_image")
    assert not tok.exports("embed_text")  # no tokenizer has so few words
    text = tok.embed_text(io["in.text"])
    assert off(text, io["out.clip_text"]) < 1e-5
    image = tok.embed_image(tok.modality.to_display(io["in.image_sq"]))
    bias = 0.0 if clip.logit_bias is None else clip.logit_bias
    assert off(clip.logit_scale.exp() * image @ text.T + bias, io["out.logits_per_image"]) < 8e-4


@pytest.mark.parametrize("shape", ["sq", "ns"])
@torch.no_grad()
def test_intermediate_features_equal_the_release(case: tuple[Tokenizer, Any], shape: str) -> None:
    tok, io = case
    stored = [io[f"out.{shape}.inter{j}.patch"] for j in range(9) if f"out.{shape}.inter{j}.patch" in io]
    n: Any = [0, 2] if (len(stored), tok.spec.depth) == (2, 3) else len(stored)
    images = tok.modality.to_display(io[f"in.image_{shape}"])
    for j, (found, patches) in enumerate(zip(tok.intermediate(images, n), stored, strict=True)):
        assert off(found.patches, patches) < 1e-3
        assert off(found.cls, io[f"out.{shape}.inter{j}.cls"]) < 1e-3
    with pytest.raises(ValueError, match="names no blocks"):
        tok.intermediate(images, [tok.spec.depth])
    if shape == "ns":
        raw = tok.intermediate(images, 1, norm=False)[0]
        grid = raw.patches.transpose(1, 2).unflatten(2, raw.grid)
        assert off(grid, io["out.ns.inter_last_unnormed_reshaped"]) < 1e-3


@torch.no_grad()
def test_rotation_in_float32_is_an_option() -> None:
    exact = Tokenizer.from_pretrained(
        SMALL, overrides=["encoder.rope_dtype=float32", "decoder.rope_dtype=float32"]
    )
    io = load_file(SMALL / "io.safetensors")
    images = exact.modality.to_display(io["in.image_ns"])
    assert off(exact.encode(images), io["out.rope32exact.ns.latents"]) < 2e-5
    assert exact.stack.config["encoder"]["rope_dtype"] == "float32"
    assert Tokenizer.from_pretrained(SMALL).stack.config["encoder"]["rope_dtype"] == "bfloat16"


# ---- untrusted files

Change = Callable[[dict[str, Tensor]], object]


def copied(folder: Path, change: Change | None = None, **fields: Any) -> Path:
    out = shutil.copytree(SMALL, folder / "copy", ignore=shutil.ignore_patterns("io*", "grads*"))
    if change is not None:
        state = load_file(SMALL / "model.safetensors")
        change(state)
        save_file(state, out / "model.safetensors")
    if fields:
        config = json.loads((SMALL / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


def put(name: str, value: float) -> Change:
    return lambda state: state[name].fill_(value)


BROKEN: Mapping[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop("trunk.norm.weight"), r"1 missing[\s\S]*missing +trunk\.norm\.weight"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), r"1 unexpected[\s\S]*unexpected +extra"),
    "shape": (lambda s: s.update(ln=s.pop("ln_final.bias")), r"1 missing, 1 unexpected"),
    "transposed": (
        lambda s: s.update({"visual_proj.weight": s["visual_proj.weight"].T.contiguous()}),
        r"shape +visual_proj\.weight +32 x 24 +24 x 32",
    ),
    "whole": (lambda s: s.update(logit_scale=torch.tensor(2)), r"dtype +logit_scale +F32 +I64"),
    "zero": (put("trunk.blocks.1.attn.proj.weight", 0), r"1 all zero[\s\S]*trunk\.blocks\.1\.attn\.proj"),
    "zero bias": (put("pixel_decoder.proj_out.bias", 0), r"all zero +pixel_decoder\.proj_out\.bias"),
    "nan": (lambda s: s["trunk.cls_token"][0, 0, :1].fill_(torch.nan), r"not finite +trunk\.cls_token .*NaN"),
    "inf": (put("token_embedding.weight", torch.inf), r"not finite +token_embedding\.weight .*inf"),
    "periods": (put("trunk.rope_embed.periods", 3), r"periods +trunk\.rope_embed\.periods"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_do_not_fit_are_refused_with_a_table(tmp_path: Path, kind: str) -> None:
    change, message = BROKEN[kind]
    with pytest.raises(DataFault, match=message):
        read_official(copied(tmp_path, change))


def test_the_command_ends_with_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied(tmp_path, BROKEN["nan"][0])
    code, _, errors = run(capsys, "encode", str(path), "none.png", "-o", str(tmp_path / "z.safetensors"))
    assert (code, "not finite" in errors) == (4, True)


def test_the_command_shows_the_whole_table_of_up_to_twenty_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copied(tmp_path, lambda state: [state.pop(name) for name in sorted(state)[:30]])
    code, _, errors = run(capsys, "encode", str(broken), "none.png", "-o", str(tmp_path / "z.safetensors"))
    lines = errors.splitlines()
    assert code == 4
    assert len(lines) <= 20
    assert sum(line.startswith("missing") for line in lines) == 16
    assert "and 14 more" in lines[-1]


def test_a_tower_that_has_not_trained_yet_is_no_broken_one(tmp_path: Path) -> None:
    def young(state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            if name.endswith("bias") or name == "trunk.mask_token":
                value.zero_()

    assert read_official(copied(tmp_path, young))[1]["tokenizer"]


def test_narrower_tensors_are_widened(tmp_path: Path) -> None:
    def halved(state: dict[str, Tensor]) -> None:
        state.update({name: value.bfloat16() for name, value in state.items()})

    parts = read_official(copied(tmp_path, halved))[1]
    assert {value.dtype for part in parts.values() for value in part.values()} == {torch.float32}


def test_shards_are_read_and_their_index_is_not_trusted(tmp_path: Path) -> None:
    path = copied(tmp_path)
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    held = {name: files[index % 2] for index, name in enumerate(state)}
    for file in files:
        save_file({name: state[name] for name in state if held[name] == file}, path / file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": held}))
    whole, parts = read_official(SMALL)[1], read_official(path)[1]
    assert all(torch.equal(parts[part][k], v) for part in whole for k, v in whole[part].items())
    index.write_text(
        json.dumps({"weight_map": {**held, "logit_scale": files[held["logit_scale"] == files[0]]}})
    )
    with pytest.raises(DataFault, match="does not hold the tensors"):
        read_official(path)
    for evil in ("../x.safetensors", "/etc/passwd", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(held, evil)}))
        with pytest.raises(DataFault, match="weight_map"):
            read_official(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip'"),
        ({"vision_depth": "2"}, "vision_depth"),
        ({"vision_depth": True}, "vision_depth"),
        ({"vision_depth": 10**9}, "vision_depth"),
        ({"vision_embed_dim": -1}, "vision_embed_dim"),
        ({"vision_mlp_ratio": float("nan")}, "vision_mlp_ratio"),
        ({"vision_ffn_layer": "os.system"}, "vision_ffn_layer"),
        ({"vision_num_heads": 7}, "vision_num_heads 7"),
        ({"vision_patch_size": 8}, "vision_patch_size 8"),
        ({"text_pool_type": "last"}, "text_pool_type"),
        ({"text_no_causal_mask": True}, "text_no_causal_mask"),
        ({"image_size": 40}, "image_size 40"),
        ({"vision_depth": 3}, "14 missing"),
        ({"text_vocab_size": 1 << 20}, r"token_embedding\.weight"),
    ],
)
def test_a_config_is_refused_by_the_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFault, match=message):
        Tokenizer.from_pretrained(copied(tmp_path, **fields))


def test_fields_that_are_not_known_are_not_read(tmp_path: Path) -> None:
    evil = {"auto_map": {"AutoModel": "evil.Model"}, "_target_": "os.system", "path": "https://x.invalid/a"}
    tok = Tokenizer.from_pretrained(copied(tmp_path, **evil))
    assert not any(word in tok.stack.yaml() for word in ("evil", "os.system", "invalid"))


@pytest.mark.parametrize("text", ["", "[" * 60_000, "{" + " " * 70_000 + "}", '{"model_type": NaN}', "\xff"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = copied(tmp_path)
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataFault, match=r"config\.json"):
        Tokenizer.from_pretrained(path)


def test_weights_in_a_pickle_are_named_and_not_read(tmp_path: Path) -> None:
    path = copied(tmp_path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(DataFault, match="is a pickle"):
        read_official(path)


def test_the_hub_is_asked_for_ids_only_and_not_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFault, match=r"forbidden \(VTP_OFFLINE\)"):
        Tokenizer.from_pretrained("MiniMaxAI/VTP-Small-f16d64")
    (tmp_path / "runs").mkdir()
    assert not is_id("runs/demo")  # a mistyped path
    for path in ("runs/demo", "/no/such", "a/b/c", "../x"):
        with pytest.raises(DataFault, match=r"no run directory|no directory"):
            Tokenizer.from_pretrained(path)


# ---- as RUN


def test_standardised_latents_say_how_to_get_statistics() -> None:
    with pytest.raises(DataFault, match=r"vtp latents DIR data\.use=.*[\s\S]*--statistics"):
        Tokenizer.from_pretrained(SMALL).encode(torch.rand(1, 3, 32, 32), standardized=True)


def test_a_directory_is_measured_on_given_data(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["data.use=emoji", "probes.reconstruction.limit=8"]
    code, out, errors = run(capsys, "eval", str(SMALL), *changes, "--json")
    assert code == 0, errors
    assert {row["probe"].partition("/")[0] for row in json.loads(out)} == {"reconstruction"}


def test_any_stack_starts_from_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = load_stack("vtp-s", [f"tokenizer.from={SMALL}", "encoder.drop_path=0.1"])
    assert (stack.config["encoder"]["width"], stack.config["encoder"]["drop_path"]) == (48, 0.1)
    assert stack.config["bottleneck"] == {"use": "linear", "channels": 24}
    assert stack.config["objectives"]["clip"] == {"weight": 1.0}  # nothing reads texts into its 64 words
    text = "size: tiny\ndata: {use: emoji, workers: 0, batch_size: 8}\n" + TRAINED
    changes = [
        f"tokenizer.from={SMALL}",
        "train.steps=1",
        "train.optim.lr=1e-12",
        f"run.dir={tmp_path / 'run'}",
    ]
    code, _, errors = run(capsys, "train", str(write_stack(tmp_path, text)), *changes)
    assert code == 0, errors
    assert "new: objectives.clip, objectives.dino, the EMA teacher (a copy)" in errors
    before, after = Tokenizer.from_pretrained(SMALL), Tokenizer.from_pretrained(tmp_path / "run")
    ema = Tokenizer.from_pretrained(tmp_path / "run", weights="ema")
    images = torch.rand(1, 3, 32, 32)
    assert off(after.encode(images), before.encode(images)) < 1e-2
    assert off(ema.encode(images), before.encode(images)) < 1e-2
    assert after.embed_image(images).shape == after.embed_text(["a flag"]).shape == (1, 24)


TRAINED = """
encoder: {use: vit, patch: 8, image_size: 32, width: 32, depth: 2, heads: 2}
bottleneck: {use: linear, channels: 8}
decoder: {use: vit_pixels, width: 32, depth: 2, heads: 2}
objectives:
  clip: {depth: 1, width: 32, heads: 2, embedding: 24, context: 16, vocabulary: 1024}
  dino: {rows: 0.5, prototypes: 64, hidden: 32, bottleneck: 16, local_crops: 2}
  reconstruction: {lpips: 0.0}
"""


def test_an_objective_of_another_size_than_the_directory_s_is_built_by_its_own_dial(tmp_path: Path) -> None:
    few = TRAINED.replace("width: 32, heads: 2, embedding: 24, ", "").replace("width: 32,", "width: 64,")
    text = "size: s\ndata: {use: emoji, workers: 0, batch_size: 4}\n" + few
    changes = [f"tokenizer.from={SMALL}", "train.steps=1", f"run.dir={tmp_path / 'run'}"]
    found = Tokenizer.from_pretrained(train(load_stack(write_stack(tmp_path, text), changes)).path)
    assert found.stack.tokenizer.size != found.stack.dial
    assert found.embed_text(["a flag"]).shape == (1, 768)  # the option's default, not that of size tiny


def test_averages_of_a_directory_are_refused() -> None:
    with pytest.raises(StackFault, match="no EMA teacher"):
        Tokenizer.from_pretrained(SMALL, weights="ema")
