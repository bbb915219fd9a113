"""Exports: the release's layout and ours, there and back without a bit changed, and twice the same."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import run, write_stack

from vtp_core import Tokenizer, load_stack, train
from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.export.source import read_source
from vtp_core.export.writing import export
from vtp_core.generation import Generator
from vtp_core.latents.writer import write_latents
from vtp_core.official.config import Config
from vtp_core.official.layout import shapes
from vtp_core.official.writing import to_official

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden")) / "vtp"
VARIANTS = sorted(path.parent for path in GOLDEN.glob("*/model.safetensors"))
SMALL = GOLDEN / "qknorm_shared"
STACK = """
modality: image
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
encoder: {use: vit, patch: 16, image_size: 32, width: 32, depth: 2, heads: 2}
bottleneck: {use: linear, channels: 8}
decoder: {use: vit_pixels, width: 32, depth: 1, heads: 2}
objectives:
  clip: {width: 32, depth: 1, heads: 2, embedding: 32, context: 16, vocabulary: 1024}
  ibot: {rows: 0.5, prototypes: 64, hidden: 32, bottleneck: 16, centering: softmax}
  reconstruction: {lpips: 0.0}
train: {steps: 2, seed: 0}
probes: {reconstruction: {limit: 8}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(load_stack(write_stack(folder, STACK), [f"run.dir={folder / 'run'}"])).path


def same(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.name)
def test_there_and_back_is_the_same_directory(path: Path, tmp_path: Path) -> None:
    export(path, tmp_path / "direct", "vtp")
    export(path, tmp_path / "native", "native")
    export(tmp_path / "native", tmp_path / "back", "vtp")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "direct" / name).read_bytes() == (path / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == (path / name).read_bytes()
    before, after = Tokenizer.from_pretrained(path), Tokenizer.from_pretrained(tmp_path / "native")
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(before.decode(before.encode(images)), after.decode(after.encode(images)))
    assert torch.equal(before.embed_image(images), after.embed_image(images))


@pytest.mark.parametrize("format", ["native", "vtp"])
def test_an_export_of_a_run_is_its_tokenizer(trained: Path, tmp_path: Path, format: str) -> None:
    for out in ("once", "twice", "once"):  # the third goes over the first
        export(trained, tmp_path / out, format)
    assert same(tmp_path / "once", tmp_path / "twice")
    before, after = Tokenizer.from_pretrained(trained), Tokenizer.from_pretrained(tmp_path / "once")
    images = torch.rand(2, 3, 48, 32)
    z = before.encode(images, standardized=True)
    assert torch.equal(z, after.encode(images, standardized=True))
    assert torch.equal(before.decode(z, standardized=True), after.decode(z, standardized=True))
    assert torch.equal(before.embed_image(images), after.embed_image(images))
    assert torch.equal(before.embed_text(["a flag"]), after.embed_text(["a flag"]))
    assert {path.name for path in tmp_path.iterdir()} == {"once", "twice"}


def test_the_release_s_layout_has_its_keys_shapes_and_dtypes(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out", "vtp")
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(state) == (5 + 14 * 2 + 2) + (3 + 16 * 1 + 4) + (12 + 7)  # specs/vtp.md 2, with QK norm
    assert {name: value.dtype for name, value in state.items() if value.dtype != torch.float32} == {
        f"{tower}.rope_embed.periods": torch.bfloat16 for tower in ("trunk", "pixel_decoder")
    }
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes(Config(**config))
    assert state["trunk.patch_embed.proj.weight"].shape == (32, 3, 16, 16)
    known = json.loads((SMALL / "config.json").read_text()).keys() - {"transformers_version"}
    assert known <= config.keys()
    assert config.keys() - known == {"rope_dtype"}  # ours rotate in float32
    assert config["rope_dtype"] == "float32"


def test_vtp_s_would_have_the_release_s_tensors() -> None:
    """The published sizes: 477 tensors, 167,177,857 parameters (specs/vtp.md 1.3)."""
    symmetric = ["encoder.qk_norm=false", "decoder={width: 384, depth: 12, heads: 6, qk_norm: false}"]
    stack = load_stack("vtp-s", symmetric)
    with torch.device("meta"):
        from vtp_core.build import blueprint, build
        from vtp_core.state import module_state

        parts = module_state(build(blueprint(stack)))
    own = {
        part: {k: torch.empty_like(v, device="meta") for k, v in held.items()} for part, held in parts.items()
    }
    wanted = shapes(fields_of(stack, own))
    assert len(wanted) == 477
    assert sum(math.prod(shape) for name, shape in wanted.items() if "periods" not in name) == 167_177_857


def fields_of(stack: object, parts: object) -> Config:
    from vtp_core.official import writing

    wrong: list[str] = []
    fields = {**writing._trunk(stack, wrong), **writing._clip(stack, wrong)}  # type: ignore[arg-type]
    assert not wrong
    return Config(model_type="vtp", **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("bottleneck=[{use: linear, channels: 8}, {use: noise}]", r"bottleneck\[1\]: noise"),
        ("bottleneck={use: rms_norm}", r"bottleneck\[0\]: rms_norm"),
        ("bottleneck.bias=true", r"bottleneck\[0\]\.bias"),
        ("encoder.patch=8", r"encoder\.patch: 8"),
        ("encoder.image_size=[32, 48]", r"encoder\.image_size"),
        ("decoder.mlp_ratio=2.0", r"decoder\.mlp_ratio: 2\.0"),
        ("decoder.rope_dtype=bfloat16", r"decoder\.rope_dtype: bfloat16"),
        ("objectives.clip.embedding=24", r"objectives\.clip\.embedding: 24"),
        ("objectives.more={use: clip}", r"objectives\.more"),
    ],
)
def test_what_the_release_s_layout_cannot_express_is_named(tmp_path: Path, change: str, message: str) -> None:
    stack = load_stack(write_stack(tmp_path, STACK), [change])
    with pytest.raises(StackFault, match=f"cannot express[\\s\\S]*{message}"):
        to_official(stack, {})


def test_a_tokenizer_without_towers_says_so_in_its_config(trained: Path, tmp_path: Path) -> None:
    stack = load_stack(
        write_stack(tmp_path, STACK), ["~objectives.clip", "~decoder", "~objectives.reconstruction"]
    )
    parts = read_source(trained).parts
    own = {key: value for key, value in parts["tokenizer"].items() if not key.startswith("decoder.")}
    config, state = to_official(stack, {"tokenizer": own})
    assert (config.train_clip, config.train_reconstruction) == (False, False)
    assert {name.partition(".")[0] for name in state} == {"trunk"}


def test_averaged_weights_are_the_teacher_s(trained: Path, tmp_path: Path) -> None:
    notes = export(trained, tmp_path / "ema", "native", weights="ema")
    ema = Tokenizer.from_pretrained(trained, weights="ema")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "ema").encode(images), ema.encode(images))
    assert any("without latent statistics" in note for note in notes)  # those of the run are the student's
    with pytest.raises(StackFault, match="no EMA teacher"):
        export(SMALL, tmp_path / "none", "native", weights="ema")
    with pytest.raises(StackFault, match="'student' or 'ema'"):
        export(SMALL, tmp_path / "none", "native", weights="teacher")


def test_statistics_are_added_where_they_are_this_tokenizer_s(trained: Path, tmp_path: Path) -> None:
    data = ["data.use=emoji", "data.batch_size=256"]
    write_latents(SMALL, tmp_path / "latents", overrides=data, split="unseen_style", flip=False)
    for format in ("native", "vtp"):
        export(SMALL, tmp_path / format, format, statistics=tmp_path / "latents")
        z = Tokenizer.from_pretrained(tmp_path / format).encode(torch.rand(1, 3, 32, 32), standardized=True)
        assert z.isfinite().all()
    with pytest.raises(DataFault, match="belong to the tokenizer"):
        export(trained, tmp_path / "other", "native", statistics=tmp_path / "latents")


def test_training_goes_on_from_an_export(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained, tmp_path / "vtp", "vtp")
    text = STACK.replace(
        "width: 32, depth: 1, heads: 2, embedding: 32, context: 16, vocabulary: 1024", "rows: 1.0"
    )
    source = write_stack(
        tmp_path, text.replace("patch: 16", "patch: 8")
    )  # of which the export's patch takes the place
    changes = [
        f"tokenizer.from={tmp_path / 'vtp'}",
        f"run.dir={tmp_path / 'run'}",
        "train.optim.lr=1e-12",
        "train.steps=1",
    ]
    code, _, errors = run(capsys, "train", str(source), *changes)
    assert code == 0, errors
    assert "; new: objectives.ibot, the EMA teacher (a copy)" in errors
    before, after = Tokenizer.from_pretrained(trained), Tokenizer.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(
        before.embed_text(["a flag"]), after.embed_text(["a flag"]), rtol=1e-4, atol=1e-5
    )


def test_a_clip_that_does_not_fit_begins_anew_and_is_listed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [
        f"tokenizer.from={trained}",
        f"run.dir={tmp_path / 'run'}",
        "train.steps=1",
        "objectives.clip.depth=2",
    ]
    code, _, errors = run(capsys, "train", str(write_stack(tmp_path, STACK)), *changes)
    assert (code, "new: objectives.clip, objectives.ibot, the EMA" in errors) == (0, True), errors


# ---- the command line, the card, verifying


def test_a_card_states_data_numbers_stack_and_licences(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "run", "native")
    card = (tmp_path / "run" / "README.md").read_text()
    reading = json.loads((trained / "probes.jsonl").read_text().splitlines()[-1])
    for said in (repr(reading["value"]), "use emoji", "patch: 16", "CC-BY-4.0", "of step 2", "| decoder |"):
        assert said in card, said
    assert str(tmp_path) not in card  # where the run lay is nobody's business
    export(SMALL, tmp_path / "release", "vtp")
    card = (tmp_path / "release" / "README.md").read_text()
    assert "MiniMax VTP" in card


def test_export_and_verify_from_the_command_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, said, errors = run(capsys, "export", str(trained), "--format", "vtp", "-o", str(out))
    assert (code, said.strip(), "rope_dtype" in errors) == (0, f"export  {out}", True)
    code, said, errors = run(capsys, "verify", str(out), "--json")
    assert code == 0, errors
    found = json.loads(said)
    assert (found["shape"], found["exports"]) == ([2, 8, 2, 2], ["embed_image", "embed_text"])
    code, said, _ = run(capsys, "verify", str(trained))
    assert (code, found["latents"] in said, found["tokenizer"] in said) == (0, True, True)
    code, _, errors = run(capsys, "export", str(trained), "--format", "gguf", "-o", str(out))
    assert (code, "no 'gguf'" in errors) == (2, True)


def test_a_broken_export_does_not_verify(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(trained, tmp_path / "out", "native")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, _, errors = run(capsys, "verify", str(tmp_path / "out"))
    assert (code, "model.safetensors" in errors, "another sha256" in errors) == (4, True, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["files"]["../model.safetensors"] = config["files"].pop("model.safetensors")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataFault, match="list of files is broken"):
        Tokenizer.from_pretrained(tmp_path / "out")


def test_a_folder_with_other_things_is_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageFault, match=r"not empty \(it has thesis.tex\)"):
        export(trained, tmp_path, "native")
    (tmp_path / "thesis.tex").rename(tmp_path / "README.md")
    with pytest.raises(StorageFault, match=r"not empty \(it has README.md\)"):
        export(trained, tmp_path, "native")
    with pytest.raises(StorageFault, match="is what is exported"):
        export(trained, trained, "native")
    with pytest.raises(StorageFault, match="cannot be made"):
        export(trained, tmp_path / "README.md" / "out", "native")


def test_an_export_needs_its_run_no_longer(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained, tmp_path / "moved")
    export(moved, tmp_path / "out", "native")
    shutil.rmtree(moved)
    assert Tokenizer.from_pretrained(tmp_path / "out").exports("embed_text")
    export(tmp_path / "out", tmp_path / "again", "native")
    assert same(tmp_path / "out", tmp_path / "again")


def test_a_generator_travels_with_its_tokenizer(trained: Path, tmp_path: Path) -> None:
    text = """
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
tokenizer: {frozen: [encoder, bottleneck, decoder]}
generator: {use: lightningdit, patch: 1, width: 32, depth: 1, heads: 2, path: {use: linear}, condition: label,
            ema: {decay: 0.9}}
sampler: {use: euler, steps: 2}
objectives: {flow: {}}
train: {steps: 2, seed: 0}
"""
    changes = [f"tokenizer.from={trained}", f"run.dir={tmp_path / 'run'}"]
    path = train(load_stack(write_stack(tmp_path, text), changes)).path
    export(path, tmp_path / "out", "native")
    export(path, tmp_path / "ema", "native", weights="ema")
    before = Generator.from_pretrained(path).sample(2, labels=[0, 1])
    assert torch.equal(Generator.from_pretrained(tmp_path / "out").sample(2, labels=[0, 1]), before)
    averaged = Generator.from_pretrained(tmp_path / "ema")
    assert averaged.weights == "student"
    assert torch.equal(averaged.sample(2, labels=[0, 1]), before)
    assert Tokenizer.from_pretrained(tmp_path / "out").embed_text(["a flag"]).shape == (1, 32)
    assert str(tmp_path) not in (tmp_path / "out" / "stack.yaml").read_text()
