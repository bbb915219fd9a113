"""The layout of diffusers: written without it, read as a run, the same bytes each time, and nothing broken believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exports import OFFICIAL, autoencoder_run, same_folder, same_tensors, same_tokenizer, trained_run
from safetensors.torch import load_file, save_file
from small import run, write_stack
from torch import Tensor

from vtp_core import Tokenizer, load_stack
from vtp_core.errors import DataFault, StackFault
from vtp_core.export.diffusers_reading import WEIGHTS
from vtp_core.export.verifying import looked_at
from vtp_core.export.writing import export
from vtp_core.tokenizer import read_run
from vtp_plugins.importing import Mismatch
from vtp_plugins.registry import Registry


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diffusers") / "out"
    export(trained_run(), out, "diffusers")
    return out


def test_it_is_written_without_diffusers_the_same_bytes_again(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {"diffusers", *(name for name in sys.modules if name.startswith("diffusers."))}:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    export(trained_run(), tmp_path / "again", "diffusers")
    assert same_folder(exported, tmp_path / "again")


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from vtp_core.export.writing import export\n"
        f"export(Path({str(trained_run())!r}), Path({str(tmp_path / 'again')!r}), 'diffusers')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert same_folder(exported, tmp_path / "again")


@pytest.mark.parametrize("source", [trained_run, autoencoder_run, lambda: OFFICIAL])
def test_an_export_is_the_run_s_tokenizer_bit_by_bit(source: Callable[[], Path], tmp_path: Path) -> None:
    notes = export(source(), tmp_path / "out", "diffusers")
    assert same_tokenizer(source(), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", WEIGHTS}
    before, after = Tokenizer.from_pretrained(source()), Tokenizer.from_pretrained(tmp_path / "out")
    images = torch.rand(2, 3, *before.spec.size)
    known = bool(before.statistics)
    z = before.encode(images, standardized=known)
    assert torch.equal(z, after.encode(images, standardized=known))
    assert torch.equal(before.decode(z, standardized=known), after.decode(z, standardized=known))
    assert any("without latent statistics" in note for note in notes) is not known
    export(tmp_path / "out", tmp_path / "again", "diffusers")
    for name in ("config.json", WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_it_goes_wherever_a_run_does(exported: Path, tmp_path: Path) -> None:
    export(exported, tmp_path / "native", "native")
    assert same_tokenizer(exported, tmp_path / "native")
    export(exported, tmp_path / "vtp", "vtp")
    config = json.loads((tmp_path / "vtp" / "config.json").read_text())
    assert (config["train_clip"], config["train_reconstruction"]) == (False, True)
    later = write_stack(
        tmp_path, "objectives: {reconstruction: {lpips: 0.0}}\ndata: {use: emoji, batch_size: 8}"
    )
    stack = load_stack(later, [f"tokenizer.from={exported}"])
    assert (stack.config["bottleneck"], stack.tokenizer.size) == ({"use": "linear", "channels": 8}, "tiny")
    found = looked_at(exported)  # what vtp verify runs in a process of its own
    assert (found["shape"], found["statistics"]) == ([2, 8, 2, 2], True)


def test_what_the_release_said_survives(tmp_path: Path) -> None:
    notes = export(OFFICIAL, tmp_path / "out", "diffusers")
    assert any("exports/clip" in note for note in notes)
    export(tmp_path / "out", tmp_path / "vtp", "vtp")
    ours, theirs = (
        load_file(tmp_path / "vtp" / "model.safetensors"),
        load_file(OFFICIAL / "model.safetensors"),
    )
    assert same_tensors(ours, {k: v for k, v in theirs.items() if k.startswith(("trunk.", "pixel_decoder."))})
    told, known = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "vtp", OFFICIAL))
    fields = {key for key in known if key.startswith(("vision_", "decoder_"))} | {"transformers_version"}
    assert {key: told[key] for key in fields} == {key: known[key] for key in fields}
    for folder in ("out", "vtp"):
        assert "MiniMax VTP" in (tmp_path / folder / "README.md").read_text()


def test_what_is_no_autoencoder_of_images_is_refused(tmp_path: Path) -> None:
    broken = shutil.copytree(trained_run(), tmp_path / "run")
    stack = (broken / "stack.yaml").read_text()
    (broken / "stack.yaml").write_text("\n".join(stack.split("decoder:")[0].splitlines()) + "\n")
    with pytest.raises(StackFault, match="without a decoder; --format onnx can"):
        export(broken, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


# ---- untrusted files

Change = Callable[[dict[str, Tensor]], object]


def copied(source: Path, out: Path, change: Change | None = None, **fields: Any) -> Path:
    shutil.copytree(source, out)
    if change is not None:
        state = load_file(source / WEIGHTS)
        change(state)
        save_file(state, out / WEIGHTS)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


def put(name: str, value: float) -> Change:
    return lambda state: state[name].fill_(value)


BROKEN: Mapping[str, tuple[Change, str]] = {
    "missing": (lambda s: s.pop("encoder.norm.weight"), r"1 tensor missing: encoder\.norm\.weight \(32,\)"),
    "unknown": (lambda s: s.update(extra=torch.ones(1)), r"1 tensor unknown: extra"),
    "shape": (
        lambda s: s.update({"decoder.norm.bias": torch.ones(3)}),
        r"decoder\.norm\.bias \(3,\) for \(32,\)",
    ),
    "nan": (put("encoder.cls_token", torch.nan), r"not finite: encoder\.cls_token NaN"),
    "zero": (put("decoder.proj_out.weight", 0), r"all zero: decoder\.proj_out\.weight"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_do_not_fit_are_refused(exported: Path, tmp_path: Path, kind: str) -> None:
    change, message = BROKEN[kind]
    with pytest.raises(Mismatch, match=f"do not fit its config.json\\n[\\s\\S]*{message}"):
        Tokenizer.from_pretrained(copied(exported, tmp_path / "copy", change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling_factor": 0.18215}, "scaling_factor"),
        ({"latents_mean": None}, "go together"),
        ({"latents_std": [0.0] * 8}, "latents_std"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, r"latents_mean \(3,\) is not of 8 channels"),
        ({"stack": {"encoder": {"use": "${oc.coerce:os.system}"}}}, "plain values"),
        ({"stack": {"hooks": {"evil": {}}}}, "stack.hooks"),
        ({"stack": {"encoder": {"use": "os.system"}}}, "os.system"),
        ({"stack": {"encoder": {"use": "vit", "_target_": "os.system"}}}, "_target_"),
    ],
)
def test_fields_that_cannot_be_are_refused(
    exported: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataFault, StackFault), match=message):
        Tokenizer.from_pretrained(copied(exported, tmp_path / "copy", **fields))


def test_weights_in_several_files_are_read_by_their_index_only(exported: Path, tmp_path: Path) -> None:
    copy = copied(exported, tmp_path / "copy")
    state = list(load_file(copy / WEIGHTS).items())
    (copy / WEIGHTS).unlink()
    halves = {
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": dict(state[i - 1 :: 2]) for i in (1, 2)
    }
    for name, half in halves.items():
        save_file(half, copy / name)
    index = copy / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, half in halves.items() for key in half}}))
    assert same_tokenizer(exported, copy)
    index.write_text(
        json.dumps({"weight_map": {key: f"../{name}" for name, half in halves.items() for key in half}})
    )
    with pytest.raises(DataFault, match="names files other than diffusion_pytorch_model-00001"):
        read_run(copy)
    index.unlink()
    with pytest.raises(DataFault, match="has neither diffusion_pytorch_model"):
        read_run(copy)


def test_statistics_know_whose_they_are_until_the_weights_change(exported: Path, tmp_path: Path) -> None:
    own = Tokenizer.from_pretrained(exported).statistics
    assert own.keys() == Tokenizer.from_pretrained(trained_run()).statistics.keys() == {
        "mean", "std", "count", "of", "data",
    }  # fmt: skip
    trained_on = copied(exported, tmp_path / "copy", put("bottleneck.links.0.weight", 0.5))
    changed = Tokenizer.from_pretrained(trained_on).statistics
    assert changed.keys() == {"mean", "std"}
    assert torch.equal(changed["mean"], own["mean"])


PLUGIN = """
from torch import nn


class Halved(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.channels = spec.channels

    def forward(self, x, clock=None):
        return {"latent": x / 2}


PLUGINS = {"bottlenecks": {"halved": Halved}}
"""


def test_a_component_of_a_single_file_is_exported_where_the_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = shutil.copytree(trained_run(), tmp_path / "run")
    tree = yaml.safe_load((made / "stack.yaml").read_text())
    tree["bottleneck"] = [tree["bottleneck"], {"use": "halved"}]
    (made / "stack.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "halved.py").write_text(PLUGIN)
    line = ("export", str(made), "--format", "diffusers", "-o", str(tmp_path / "out"))
    code, _, errors = run(capsys, *line)
    assert (code, "halved" in errors) == (2, True)
    code, _, errors = run(capsys, *line, "--plugin", str(tmp_path / "halved.py"))
    assert code == 0, errors
    images = torch.rand(1, 3, 32, 32)
    half = Tokenizer.from_pretrained(tmp_path / "out", registry=Registry([tmp_path / "halved.py"]))
    torch.testing.assert_close(
        2 * half.encode(images), Tokenizer.from_pretrained(trained_run()).encode(images)
    )
