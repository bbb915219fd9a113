"""Graphs for onnxruntime: they give what torch gives for any batch, carry no traces, and are checked before use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import OFFICIAL, autoencoder_run, same_folder, trained_run
from small import run
from torch import Tensor, nn

from vtp_core import Tokenizer
from vtp_core.errors import DataFault, StackFault
from vtp_core.export import onnx_session, onnx_writing
from vtp_core.export.onnx_graphs import graph_of, widen
from vtp_core.export.source import read_source
from vtp_core.export.writing import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("onnx") / "out"
    return out, export(trained_run(), out, "onnx")


def computed(folder: Path, file: str, **inputs: Tensor) -> dict[str, Tensor]:
    found = onnx_session.run(folder / file, {name: value.numpy() for name, value in inputs.items()}, 1)
    return {name: torch.from_numpy(value) for name, value in found.items()}


def agrees(folder: Path, run: Path, rows: int, limit: float) -> None:
    """Hold every output against our tokenizer."""
    tokenizer = Tokenizer.from_pretrained(run)
    images = torch.rand(rows, 3, *tokenizer.spec.size)
    found, features = computed(folder, "encoder.onnx", images=images), tokenizer.features(images)
    aims = {"latent": tokenizer.encode(images), "cls": features.cls, "patches": features.patches}
    known = bool(tokenizer.statistics)
    if known:
        aims["standardized"] = tokenizer.encode(images, standardized=True)
    if tokenizer.exports("embed_image"):
        aims["embedding"] = tokenizer.embed_image(images)
    assert found.keys() == aims.keys()
    for name, aim in aims.items():
        assert float((found[name] - aim).norm() / aim.norm()) < limit, name
    z = found["standardized" if known else "latent"]
    (image,) = computed(folder, "decoder.onnx", **{"standardized" if known else "latent": z}).values()
    aim = tokenizer.decode(z, standardized=known)
    assert float((image - aim).norm() / aim.norm()) < limit


@pytest.mark.parametrize("rows", [1, 5])
def test_graphs_give_what_torch_gives_for_any_batch(exported: tuple[Path, list[str]], rows: int) -> None:
    agrees(exported[0], trained_run(), rows, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "limit"), [(autoencoder_run, 1e-5), (lambda: OFFICIAL, 4e-3)])
def test_other_tokenizers_agree_too(source: Callable[[], Path], limit: float, tmp_path: Path) -> None:
    export(source(), tmp_path / "out", "onnx")
    agrees(tmp_path / "out", source(), 3, limit)


def test_what_is_written_is_valid_and_says_nothing_of_this_machine(exported: tuple[Path, list[str]]) -> None:
    folder, notes = exported
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "encoder.onnx", "decoder.onnx",
    }  # fmt: skip
    for file in ("encoder.onnx", "decoder.onnx"):
        raw = (folder / file).read_bytes()
        model = onnx.load_from_string(raw)
        onnx.checker.check_model(model, full_check=True)
        assert not {node.domain for node in model.graph.node} - {""}  # ours are plain operators while traced
        for trace in (b"/vtp", b"site-packages", b"stack_trace", os.fsencode(Path.cwd()), b".py"):
            assert trace not in raw, trace
    card = (folder / "README.md").read_text()
    assert any("onnxruntime agrees with torch" in note for note in notes)
    for said in (
        "| encoder.onnx | out | standardized |",
        "B x 8 x 2 x 2",
        "encoder.onnx 5e-07"[:13],
        "embed",
    ):
        assert said in card, said


def test_a_graph_made_again_is_the_same_bytes(exported: tuple[Path, list[str]], tmp_path: Path) -> None:
    tokenizer, embedder = onnx_writing._tokenizer(read_source(trained_run()))
    decoding = onnx_writing._drawings(tokenizer, embedder)["decoder.onnx"]
    onnx_writing._draw(tmp_path / "decoder.onnx", decoding)
    assert (tmp_path / "decoder.onnx").read_bytes() == (exported[0] / "decoder.onnx").read_bytes()


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(exported: tuple[Path, list[str]], tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from vtp_core.export.writing import export\n"
        f"export(Path({str(trained_run())!r}), Path({str(tmp_path / 'again')!r}), 'onnx')"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    assert same_folder(exported[0], tmp_path / "again")


def test_verify_runs_them_in_a_process_without_torch(
    exported: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, errors = run(capsys, "verify", str(exported[0]), "--json")
    assert code == 0, errors
    found = json.loads(said)
    assert (found["shape"], found["statistics"]) == ([2, 8, 2, 2], True)
    assert {"latent", "standardized", "cls", "patches", "embedding", "image", "onnxruntime"} <= found.keys()
    probe = (
        "import sys; sys.argv = ['', sys.argv[1]]\n"
        "import runpy; runpy.run_module('vtp_core.export.verifying', run_name='__main__')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe, str(exported[0])], check=True, capture_output=True)
    code, _, errors = run(capsys, "encode", str(exported[0]), "a.png", "-o", str(tmp_path / "z"))
    assert (code, "is an export to ONNX" in errors) == (4, True)


def test_a_broken_graph_does_not_verify(exported: tuple[Path, list[str]], tmp_path: Path) -> None:
    copy = shutil.copytree(exported[0], tmp_path / "copy")
    raw = bytearray((copy / "encoder.onnx").read_bytes())
    raw[-1] ^= 1
    (copy / "encoder.onnx").write_bytes(raw)
    with pytest.raises(DataFault, match=r"encoder\.onnx has another sha256[\s\S]*export it again"):
        onnx_session.looked_at(copy)
    config: Any = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "files": {}}))
    (copy / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(DataFault, match="onnxruntime cannot run it"):
        onnx_session.looked_at(copy)
    graphs = {"../encoder.onnx": config["graphs"]["encoder.onnx"]}
    (copy / "config.json").write_text(json.dumps({**config, "graphs": graphs}))
    with pytest.raises(DataFault, match="graphs"):
        onnx_session.looked_at(copy)


def test_a_graph_that_differs_from_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writing, "TOLERANCE", {False: -1.0, True: -1.0})
    drawing = onnx_writing._Drawing(nn.Linear(4, 4), torch.randn(2, 4), "x", ("y",))
    with pytest.raises(StackFault, match=r"far\.onnx: y differs from torch by [\s\S]*nothing was written"):
        onnx_writing._draw(tmp_path / "far.onnx", drawing)


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackFault, match=r"needs onnxnone[\s\S]*pip install 'vtp-plugins\[onnx\]'"):
        onnx_session.check_installed(("onnx", "onnxnone"))


def test_a_tokenizer_without_a_decoder_has_one_graph(tmp_path: Path) -> None:
    source = read_source(trained_run())
    config = {key: node for key, node in source.stack.config.items() if key != "decoder"}
    less = replace(source, stack=replace(source.stack, config=config))
    tokenizer, _ = onnx_writing._tokenizer(less)
    assert set(onnx_writing._drawings(tokenizer, None)) == {"encoder.onnx"}


# ---- the graph itself


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.bfloat16)
        return (y * y + y).float() - x


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    import onnx_ir

    x = torch.randn(2, 50)
    graph, rounds = graph_of(Rounded(), x, "x", ("y",), "rounded")
    assert rounds
    assert not widen(graph)  # nothing is left to do
    onnx_ir.save(graph, tmp_path / "rounded.onnx")
    more = torch.randn(7, 50)
    assert torch.equal(computed(tmp_path, "rounded.onnx", x=more)["y"], Rounded()(more))


def test_code_that_cannot_be_traced_is_told_plainly() -> None:
    with pytest.raises(StackFault, match="torch cannot make a graph of it"):
        graph_of(Untraceable(), torch.randn(2, 3), "x", ("y",), "it")


def test_heavy_weights_lie_beside_their_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writing, "LARGEST", 1000)
    drawing = onnx_writing._Drawing(nn.Linear(40, 40), torch.randn(2, 40), "x", ("y",))
    onnx_writing._draw(tmp_path / "heavy.onnx", drawing)
    assert (tmp_path / "heavy.onnx.data").stat().st_size >= 40 * 40 * 4
    x = np.ones((3, 40), dtype=np.float32)
    aim = drawing.module(torch.from_numpy(x))
    torch.testing.assert_close(computed(tmp_path, "heavy.onnx", x=torch.from_numpy(x))["y"], aim)
