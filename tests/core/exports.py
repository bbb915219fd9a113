"""What tests of exports share: a trained run, a converted KL autoencoder, and comparisons of folders."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from small import write_stack
from torch import Tensor

from vtp_core import load_stack, train
from vtp_core.converting.conversion import Request, convert
from vtp_core.tokenizer import read_run

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden"))
OFFICIAL = GOLDEN / "vtp" / "qknorm_shared"
STACK = """
modality: image
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
encoder: {use: vit, patch: 16, image_size: 32, width: 32, depth: 1, heads: 2}
bottleneck: {use: linear, channels: 8}
decoder: {use: vit_pixels, width: 32, depth: 1, heads: 2}
objectives:
  clip: {width: 32, depth: 1, heads: 2, embedding: 32, context: 16, vocabulary: 1024}
  reconstruction: {lpips: 0.0}
train: {steps: 2, seed: 0}
probes: {}
"""


def _folder() -> Path:
    """A folder that lasts as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="vtp-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def trained_run() -> Path:
    """A VTP tokenizer after two steps; made once a process."""
    folder = _folder()
    return train(load_stack(write_stack(folder, STACK), [f"run.dir={folder / 'run'}"])).path


@functools.cache
def autoencoder_run() -> Path:
    """The reference's KL autoencoder, converted, with the scale of SD's as statistics; made once a process."""
    file = GOLDEN / "repa_vavae" / "vavae.weights.safetensors"
    return convert(Request("ldm", file, words=("image_size=16",), scale=0.18215), _folder() / "run")


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two parts are equal byte by byte."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two directories hold the same tokenizer and statistics."""
    one, other = read_run(a)[1], read_run(b)[1]
    return all(same_tensors(one.get(part, {}), other.get(part, {})) for part in ("tokenizer", "statistics"))


def same_folder(a: Path, b: Path) -> bool:
    """Whether two folders hold the same bytes."""
    names = sorted(path.name for path in a.iterdir())
    if names != sorted(path.name for path in b.iterdir()):
        return False
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def golden(name: str) -> dict[str, Tensor]:
    """Stored values that travel with the repository."""
    return load_file(GOLDEN / f"{name}.safetensors")
