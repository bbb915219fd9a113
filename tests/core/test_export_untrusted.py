"""Directories of strangers: fields that name code are never used, and code beside them is never run."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import OFFICIAL, trained_run

from vtp_core import Tokenizer
from vtp_core.errors import DataFault, Fault
from vtp_core.export.verifying import looked_at
from vtp_core.export.writing import export
from vtp_core.integrations.diffusers import AutoencoderVTP

HOSTILE: dict[str, Any] = {
    "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "owner/name--evil.Evil"},
    "trust_remote_code": True,
    "custom_pipelines": {"evil": {"impl": "evil.Evil"}},
    "quantization_config": {"quant_method": "evil", "_target_": "evil.Evil"},
    "_target_": "evil.Evil",
    "__class__": "evil.Evil",
    "tokenizer_class": "evil.Evil",
    "import": "os.system",
    "hook": "${oc.coerce:evil.Evil}",
    "weights": "https://example.invalid/evil.pt",
}
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n\n\nclass Evil:\n    pass\n"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket and no process may be opened."""
    trained_run()  # whose training looks for a commit

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a stranger's directory reached out")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(subprocess, "Popen", refused)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """``hostile(directory)``: a copy with fields that name code, and that code beside it, on Python's path even."""
    made = []

    def copied(source: Path) -> Path:
        out = tmp_path / f"copy{len(made)}"
        shutil.copytree(source, out, ignore=shutil.ignore_patterns("io*", "grads*"))
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**HOSTILE, **config}))
        for name in ("evil.py", "modeling_vtp.py", "__init__.py", "hubconf.py"):
            (out / name).write_text(EVIL)
        monkeypatch.syspath_prepend(str(out))
        monkeypatch.chdir(out)
        made.append(out)
        return out

    yield copied
    assert not [out for out in made if (out / "ran").exists()]
    assert "evil" not in sys.modules


@pytest.mark.parametrize("format", ["official", "native", "diffusers"])
def test_fields_that_name_code_are_not_used(
    hostile: Callable[[Path], Path], tmp_path: Path, format: str
) -> None:
    plain = OFFICIAL
    if format != "official":
        plain = tmp_path / "plain"
        export(OFFICIAL, plain, format)
    before = Tokenizer.from_pretrained(plain)
    export(plain, tmp_path / "warm", "native")  # imports what it needs
    path, modules = hostile(plain), set(sys.modules)
    after = Tokenizer.from_pretrained(path)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(before.encode(images), after.encode(images))
    export(path, tmp_path / "again", "native")
    if format == "diffusers":
        AutoencoderVTP.from_pretrained(path).encode(images)
    assert set(sys.modules) == modules


@pytest.mark.parametrize("name", ["os.system", "evil:Evil", "../evil"])
def test_names_mean_what_is_installed_and_nothing_else(
    hostile: Callable[[Path], Path], tmp_path: Path, name: str
) -> None:
    export(trained_run(), tmp_path / "plain", "diffusers")
    path = hostile(tmp_path / "plain")
    config, modules = json.loads((path / "config.json").read_text()), set(sys.modules)
    for section in ("encoder", "bottleneck", "decoder"):
        stack = {**config["stack"], section: {**config["stack"][section], "use": name}}
        (path / "config.json").write_text(json.dumps({**config, "stack": stack}))
        for load in (Tokenizer.from_pretrained, AutoencoderVTP.from_pretrained, looked_at):
            with pytest.raises(Fault):
                load(path)
    official = hostile(OFFICIAL)
    fields = json.loads((official / "config.json").read_text())
    for key in ("vision_ffn_layer", "decoder_norm_layer", "rope_dtype", "model_type"):
        (official / "config.json").write_text(json.dumps({**fields, key: name}))
        with pytest.raises(DataFault, match=key):
            Tokenizer.from_pretrained(official)
    assert set(sys.modules) == modules


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"_class_name": NaN}', "\x00"])
def test_a_config_that_is_none_is_a_data_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataFault):
        Tokenizer.from_pretrained(tmp_path)
