"""A stack small enough to train in a test: 32 px emoji, two blocks of width 32."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtp_core.cli import main

STACK = """
modality: image
size: tiny
data: {use: emoji, batch_size: 16, workers: 0}
encoder: {use: vit, patch: 8, image_size: 32, width: 32, depth: 2, heads: 2}
bottleneck: {use: linear, channels: 8}
decoder: {use: vit_pixels, width: 32, depth: 2, heads: 2}
objectives:
  clip: {weight: 1.0, width: 32, depth: 1, heads: 2, embedding: 16}
  dino: {weight: 1.0, rows: 0.25, prototypes: 64, hidden: 32, bottleneck: 16, local_crops: 2}
  ibot: {weight: 1.0, rows: 0.25, prototypes: 64, hidden: 32, bottleneck: 16, centering: softmax}
  koleo: {weight: 0.1, rows: 0.25}
  reconstruction: {weight: 0.1, rows: 0.25, lpips: 0.0}
train: {steps: 6, seed: 0, checkpoint_every: 2}
"""


def write_stack(folder: Path, text: str = STACK) -> Path:
    """The stack as a file."""
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of one command, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    shown = capsys.readouterr()
    return int(ended.value.code or 0), shown.out, shown.err
