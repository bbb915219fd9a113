"""Loading a VTP directory takes little more memory than its file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vtp_core.models.rope import Rope
from vtp_core.official.config import Config
from vtp_core.official.layout import PERIODS, shapes

LOAD = """
import sys
from pathlib import Path
from vtp_core import Tokenizer

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

Tokenizer.from_pretrained(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of imports
before = status("VmRSS")
tokenizer = Tokenizer.from_pretrained(sys.argv[2])
print(status("VmHWM") - before)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
TEXT = {"text_vocab_size": 600, "text_embed_dim": 64, "text_num_heads": 2, "text_depth": 1}
LITTLE = {**TEXT, "vision_embed_dim": 64, "vision_num_heads": 1, "vision_depth": 1, "decoder_embed_dim": 64,
          "decoder_num_heads": 1, "decoder_depth": 1}  # fmt: skip
LARGE = {"vision_embed_dim": 1024, "vision_num_heads": 16, "vision_depth": 24, "decoder_embed_dim": 1024,
         "decoder_num_heads": 16, "decoder_depth": 24}  # fmt: skip


def directory(path: Path, **fields: object) -> int:
    """A VTP directory of a given shape; returns the bytes of its weights."""
    config = Config(model_type="vtp", **fields)  # type: ignore[arg-type]
    state = {name: torch.full(shape, 0.01) for name, shape in shapes(config).items()}
    for tower, prefix in (("trunk", "vision"), ("pixel_decoder", "decoder")):
        heads = getattr(config, f"{prefix}_num_heads")
        state[f"{tower}.{PERIODS}"] = Rope(
            getattr(config, f"{prefix}_embed_dim") // heads, 2, "bfloat16"
        ).periods
    path.mkdir()
    (path / "config.json").write_text(config.text())
    save_file(state, path / "model.safetensors")
    return (path / "model.safetensors").stat().st_size


def ratio(folder: Path, **fields: object) -> float:
    """Peak of a process that loads a directory, over the bytes of its weights."""
    directory(folder / "little", **LITTLE)
    size = directory(folder / "large", **fields)
    command = [sys.executable, "-c", LOAD, str(folder / "little"), str(folder / "large")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / size


def test_a_directory_is_loaded_without_a_second_copy(tmp_path: Path) -> None:
    assert ratio(tmp_path, **{**LARGE, "vision_depth": 4, "decoder_depth": 4, **TEXT}) < 1.2


@pytest.mark.slow
def test_a_directory_of_vtp_large_is_loaded_without_a_second_copy(tmp_path: Path) -> None:
    assert ratio(tmp_path, **LARGE) < 1.2
