"""`vtp convert` without any plugin: files, holders, options, statistics and what is refused."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small import run
from torch import Tensor

from vtp_core.build import blueprint, tokenizer_only
from vtp_core.converting.conversion import Request, convert
from vtp_core.converting.files import read, state_dict
from vtp_core.converting.statistics import of_file
from vtp_core.errors import DataFault, StackFault
from vtp_core.overrides import read as read_stack
from vtp_core.stack import check_stack
from vtp_core.state import module_state
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.importing import Mismatch
from vtp_plugins.registry import Registry

SECTIONS: dict[str, Any] = {
    "encoder": {"use": "vit", "patch": 8, "image_size": 16, "width": 32, "depth": 1, "heads": 2},
    "bottleneck": [{"use": "linear", "channels": 4}],
    "decoder": {"use": "vit_pixels", "width": 32, "depth": 1, "heads": 2},
}
PLUGIN = """
from vtp_plugins.importing import Converted, check_tensors

SECTIONS = {sections}
SHAPES = {shapes}


class Toy:
    holders = ("network",)

    def settings(self, config):
        return {{"size": config["side"]}} if "side" in config else {{}}

    def convert(self, tensors, *, size: int = 16, loud: bool = False):
        check_tensors({{k: tuple(v.shape) for k, v in tensors.items()}}, SHAPES)
        if loud:
            raise ValueError("loud: is refused")
        sections = {{**SECTIONS, "encoder": {{**SECTIONS["encoder"], "image_size": size}}}}
        return Converted(sections, {{"tokenizer": {{k[1:]: v for k, v in tensors.items()}}}}, left=("loss.weight",))


PLUGINS = {{"importers": {{"toy": Toy()}}}}
"""


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    stack = check_stack("toy", {"modality": "image", **SECTIONS}, Registry())
    return {f"x{name}": t for name, t in module_state(tokenizer_only(blueprint(stack)))["tokenizer"].items()}


@pytest.fixture
def registry(tmp_path: Path, theirs: dict[str, Tensor]) -> Registry:
    file = tmp_path / "toy_plugin.py"
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    file.write_text(PLUGIN.format(sections=SECTIONS, shapes=shapes))
    return Registry([file])


def saved(folder: Path, what: Any, name: str = "weights.pt") -> Path:
    torch.save(what, folder / name)
    return folder / name


# ---- a directory of ours


def test_what_was_converted_loads_as_a_run(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    file, out, told = tmp_path / "weights.safetensors", tmp_path / "out", list[str]()
    save_file(theirs, file)
    assert convert(Request("toy", file, scale=0.5), out, registry, told.append) == out
    tokenizer = Tokenizer.from_pretrained(out)
    assert all(torch.equal(tokenizer.state_dict()[name[1:]], tensor) for name, tensor in theirs.items())
    z = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert torch.allclose(tokenizer.encode(torch.rand(0, 3, 16, 16), True), z[:0])
    assert torch.equal(tokenizer.model.standardise(z), z * 0.5)
    assert told == ["left out, as they belong to others: loss.weight"]
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished" and record["converted"]["format"] == "toy"
    assert list(record["converted"]["files"]) == ["weights.safetensors"]


def test_words_are_options_of_the_importer_or_keys_of_the_stack(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    file = saved(tmp_path, theirs)
    out = convert(
        Request("toy", file, words=("size=32", "encoder.drop_path=0.1")), tmp_path / "out", registry
    )
    encoder = read_stack(out / "stack.yaml")["encoder"]
    assert encoder["image_size"] == 32 and encoder["drop_path"] == 0.1
    for word, match in (
        ("siez=3", "did you mean 'size'"),
        ("size=x", "toy.size: "),
        ("loud=true", "loud: is refused"),
    ):
        with pytest.raises((StackFault, DataFault), match=match):
            convert(Request("toy", file, words=(word,)), tmp_path / "no", registry)
    assert not (tmp_path / "no").exists()


def test_two_files_make_one_network(tmp_path: Path, theirs: dict[str, Tensor], registry: Registry) -> None:
    names = sorted(theirs)
    one = saved(tmp_path, {name: theirs[name] for name in names[:5]}, "one.pt")
    two = saved(tmp_path, {"state_dict": {name: theirs[name] for name in names[5:]}}, "two.ckpt")
    convert(Request("toy", one, beside=(two,)), tmp_path / "out", registry)
    with pytest.raises(DataFault, match="both have x"):
        convert(Request("toy", one, beside=(one,)), tmp_path / "no", registry)


def test_a_directory_that_holds_something_stays_as_it_is(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    file = saved(tmp_path, theirs)
    convert(Request("toy", file), tmp_path / "out", registry)
    for place in (tmp_path / "out", tmp_path):
        with pytest.raises(StackFault, match=r"holds a run already|is not empty"):
            convert(Request("toy", file), place, registry)


# ---- where the weights are


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ({"w": 1}, None),
        ({"model": {"w": 0}, "ema": {"w": 1}}, None),
        ({"model": {"w": 1}, "ema": {"w": 0}}, "model"),
        ({"state_dict": {"module.w": 1}, "epoch": 3}, None),
        ({"model": {"module.model.w": 1}}, None),
        ({"network": {"w": 1}, "ema": {"w": 0}}, None),
        ({"state_dict": {"network.w": 1, "other.w": 0}}, None),
        ({"state_dict": {"network.w": 0, "other.w": 1}}, "state_dict.other"),
        ({"a.b.w": 1, "c.w": 0}, "a.b"),
        ({"module._orig_mod.w": 1}, None),
        ({"state_dict": {"module.network._orig_mod.w": 1, "module.other.w": 0}}, None),
        ({"ema": {"module.model.w": 1}, "model": {"w": 0}, "optimizer": {"state": {}}}, None),
    ],
)
def test_holders_and_prefixes_are_taken_off(tmp_path: Path, file: Any, key: str | None) -> None:
    def tensors(node: Any) -> Any:
        return {k: tensors(v) if isinstance(v, dict) else torch.tensor([float(v)]) for k, v in node.items()}

    path = saved(tmp_path, tensors(file))
    assert state_dict(read(path), path, key, ("network",)).tensors == {"w": torch.tensor([1.0])}


def test_what_lies_beside_the_network_is_told(tmp_path: Path) -> None:
    one = torch.ones(1)
    path = saved(tmp_path, {"state_dict": {"network.w": one, "unet.a": one, "unet.b": one}, "epoch": 3})
    assert state_dict(read(path), path, None, ("network",)) == ({"w": one}, ("unet.a", "unet.b"))
    path = saved(tmp_path, {"ema": {"w": one}, "model": {"w": one}, "optimizer": {"state": {0: {"m": one}}}})
    assert state_dict(read(path), path).left == ("model.*",)


def test_prefixes_that_not_every_name_has_stay(tmp_path: Path) -> None:
    one = torch.ones(1)
    for names in (["module.w", "v"], ["a._orig_mod.w", "a.w"]):
        path = saved(tmp_path, dict.fromkeys(names, one))
        assert list(state_dict(read(path), path).tensors) == names


def test_a_key_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(1)}, "step": 3})
    with pytest.raises(DataFault, match="no 'modle'; did you mean 'model'"):
        state_dict(read(path), path, "modle")
    path = saved(tmp_path, {"weird": {"w": torch.ones(1)}, "step": 3})
    with pytest.raises(DataFault, match="but step, weird; --key names where"):
        state_dict(read(path), path)


def test_arguments_of_a_script_beside_the_weights_are_no_code(tmp_path: Path) -> None:
    path = saved(tmp_path, {"ema": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1e-4)})
    assert state_dict(read(path), path).tensors == {"w": torch.ones(1)}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# ---- what is refused


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "ran"),)


def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(1)}, "config": Evil(tmp_path)})
    with pytest.raises(DataFault, match=r"holds \S*mkdir, which takes code to read; it was not run"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name, content in (
        ("a.safetensors", b"x"),
        ("a.pt", b""),
        ("b.pt", b"\x80\x02K\x01."),
        ("c.ckpt", b"PK\3\4"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataFault, match=name):
            state_dict(read(tmp_path / name), tmp_path / name)
    with pytest.raises(DataFault, match="no file"):
        read(tmp_path / "none.pt")
    with pytest.raises(DataFault, match=r"not \.npz"):
        read(tmp_path / "a.npz")
    path = saved(tmp_path, {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)})
    with pytest.raises(DataFault, match="1 tensors are not finite: a"):
        state_dict(read(path), path)


def test_a_matrix_of_zeros_is_refused_unless_it_begins_as_zeros(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    young = {name: torch.zeros_like(t) if name.endswith("bias") else t for name, t in theirs.items()}
    young["xencoder.mask_token"] = torch.zeros_like(theirs["xencoder.mask_token"])
    convert(Request("toy", saved(tmp_path, young)), tmp_path / "out", registry)
    for name in ("xencoder.blocks.0.attn.qkv.weight", "xencoder.norm.weight"):
        dead = theirs | {name: torch.zeros_like(theirs[name])}
        with pytest.raises(Mismatch, match=rf"1 tensor all zero: tokenizer:{name[1:]} \("):
            convert(Request("toy", saved(tmp_path, dead)), tmp_path / "no", registry)
    assert not (tmp_path / "no").exists()


def test_options_come_from_the_configuration_beside_the_file(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    file, told = saved(tmp_path, theirs), list[str]()
    (tmp_path / "config.json").write_text(json.dumps({"side": 32, "other": 1}))
    convert(Request("toy", file), tmp_path / "a", registry, told.append)
    assert read_stack(tmp_path / "a" / "stack.yaml")["encoder"]["image_size"] == 32
    assert told[0] == f"of {tmp_path}/config.json: size=32"
    convert(Request("toy", file, words=("size=16",)), tmp_path / "b", registry)
    assert read_stack(tmp_path / "b" / "stack.yaml")["encoder"]["image_size"] == 16
    for text, match in (("{", "can't be read"), ('{"side": "x"}', "toy.size")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises((DataFault, StackFault), match=match):
            convert(Request("toy", file), tmp_path / "no", registry)


def test_other_tensors_are_told_in_a_table_with_exit_4(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: t for name, t in theirs.items() if name != "xdecoder.proj_in.bias"}
    wrong |= {"extra.a": torch.ones(2, 3), "xencoder.norm.weight": torch.ones(7)}
    file, plugin = saved(tmp_path, wrong), str(registry.files[0])
    code, shown, said = run(
        capsys, "convert", "toy", str(file), "-o", str(tmp_path / "out"), "--plugin", plugin
    )
    assert code == 4 and not shown and not (tmp_path / "out").exists()
    assert "1 tensor unknown: extra.a (2, 3)" in said
    assert "1 tensor missing: xdecoder.proj_in.bias (32,)" in said
    assert "1 tensor of another shape: xencoder.norm.weight (7,) for (32,)" in said


def test_the_command_names_formats_and_faults(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plugin, out = str(saved(tmp_path, theirs)), str(registry.files[0]), str(tmp_path / "out")
    assert run(capsys, "convert", "tyo", file, "-o", out, "--plugin", plugin)[0] == 2
    assert run(capsys, "convert", "toy", file, "-o", out, "--tokenizer", out, "--plugin", plugin)[0] == 2
    code, shown, said = run(capsys, "convert", "toy", file, "-o", out, "--plugin", plugin)
    assert code == 0 and shown == f"converted {out}\n" and "left out" in said
    assert run(capsys, "show", "importers/toy", "--plugin", plugin)[0] == 0


# ---- statistics


def test_statistics_of_others_become_mean_and_deviation(tmp_path: Path) -> None:
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    path = saved(tmp_path, {"mean": mean.view(1, 4, 1, 1), "std": std.view(1, 4, 1, 1)})
    found = of_file(path, 4, (2, 2))
    assert torch.equal(found["mean"], mean) and torch.equal(found["std"], std)
    mean, var = torch.randn(4, 2, 2), torch.rand(4, 2, 2)
    found = of_file(saved(tmp_path, {"mean": mean, "var": var}), 4, (2, 2))
    assert torch.equal(found["mean"], mean) and torch.allclose(found["std"], (var + 1e-5).sqrt())
    found = of_file(saved(tmp_path, {"mean": None, "var": var}), 4, (2, 2))
    assert not found["mean"].any()


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (
            {"mean": torch.zeros(3), "std": torch.ones(3)},
            r"of latents \(3,\); this tokenizer's are \(4, 2, 2\)",
        ),
        ({"mean": torch.zeros(4, 3, 3), "std": torch.ones(4, 3, 3)}, "one value for every position"),
        ({"mean": torch.zeros(4), "std": torch.ones(4, 2, 2)}, "differ in shape"),
        ({"mean": torch.zeros(4), "std": torch.zeros(4)}, "not above 0"),
        ({"mean": torch.zeros(4)}, "std or var is wanted"),
        ([1, 2], "holds no latent statistics"),
    ],
)
def test_statistics_of_another_latent_are_refused(tmp_path: Path, what: Any, match: str) -> None:
    with pytest.raises(DataFault, match=match):
        of_file(saved(tmp_path, what), 4, (2, 2))


def test_statistics_by_position_standardise_and_restore(
    tmp_path: Path, theirs: dict[str, Tensor], registry: Registry
) -> None:
    mean, var = torch.randn(4, 2, 2), torch.rand(4, 2, 2)
    statistics = saved(tmp_path, {"mean": mean, "var": var}, "stat.pt")
    file = saved(tmp_path, theirs)
    out = convert(Request("toy", file, statistics=statistics), tmp_path / "out", registry)
    tokenizer, images = Tokenizer.from_pretrained(out), torch.rand(2, 3, 16, 16)
    z = tokenizer.encode(images, standardized=True)
    assert torch.allclose(z, (tokenizer.encode(images) - mean) / (var + 1e-5).sqrt())
    assert torch.allclose(tokenizer.decode(z, True), tokenizer.decode(tokenizer.encode(images)), atol=1e-5)
    with pytest.raises(ValueError, match=r"statistics are of latents \(4, 2, 2\), not \(4, 4, 4\)"):
        tokenizer.encode(torch.rand(1, 3, 32, 32), True)
    with pytest.raises(StackFault, match="exclude each other"):
        convert(Request("toy", file, statistics=statistics, scale=1.0), tmp_path / "no", registry)
    with pytest.raises(StackFault, match="--scale: a positive factor"):
        convert(Request("toy", file, scale=-1.0), tmp_path / "no", registry)
