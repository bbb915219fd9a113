"""A tiny run of all that has a state: every objective, a GAN that begins later, a generator with an average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vtp_core import load_stack, train
from vtp_core.run.hashing import state_hash
from vtp_plugins.registry import Registry

PLUGIN = Path(__file__).with_name("mishaps.py")
RECIPE = """
modality: image
size: tiny
data: {use: cards, batch_size: 16, workers: 0}
encoder: {use: vit, patch: 8, image_size: 32, width: 32, depth: 1, heads: 2, drop_path: 0.1}
bottleneck: [{use: linear, channels: 8}, {use: rms_norm}]
decoder: {use: vit_pixels, width: 32, depth: 1, heads: 2}
generator: {use: lightningdit, patch: 2, width: 32, depth: 1, heads: 2, path: {use: linear}, condition: label,
  drop_condition: 0.1, ema: {decay: 0.9}}
objectives:
  clip: {weight: 1.0, width: 32, depth: 1, heads: 2, embedding: 16}
  dino: {weight: 1.0, rows: 0.25, prototypes: 32, hidden: 16, bottleneck: 8, local_crops: 1, centering: softmax}
  ibot: {weight: 1.0, rows: 0.25, prototypes: 32, hidden: 16, bottleneck: 8, centering: softmax}
  koleo: {weight: 0.1, rows: 0.5}
  reconstruction: {weight: 1.0, rows: 0.5, lpips: 0.0}
  gan: {weight: 0.5, rows: 0.5, start: 4, channels: 8, layers: 2, lecam: 0.1, diffaug: 0.5,
    balance: {against: reconstruction, at: decoder.last}, critic: {start: 2}}
  flow: {weight: 1.0}
train: {steps: 8, seed: 0, checkpoint_every: 1, keep: 100, optim: {warmup: 2}}
"""
STEPS = 8
TIMES = ("time/step", "time/data", "images_per_second")


def trained(folder: str, name: str, *changes: str) -> dict[str, Any]:
    """Train the recipe to its end; its directory, stream and hash."""
    stack = Path(folder, "recipe.yaml")
    stack.write_text(RECIPE)
    run = Path(folder, name)
    return _outcome(train(load_stack(stack, [f"run.dir={run}", *changes], Registry([PLUGIN]))).path)


def resumed(run: str) -> dict[str, Any]:
    """Continue a run to its end."""
    path = Path(run)
    return _outcome(train(load_stack(path / "stack.yaml", [], Registry([PLUGIN])), resume=path).path)


def _outcome(path: Path) -> dict[str, Any]:
    return {"run": str(path), "stream": stream(path), "hash": state_hash(path)}


def stream(run: Path) -> list[str]:
    """The rows of ``metrics.jsonl`` as text, without what a clock measured."""
    kept = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if key not in TIMES}
        kept.append(json.dumps(row))  # Python writes and reads floats without loss
    return kept


def killed(run: Path, step: int, name: str) -> Path:
    """A copy of a run as a kill after the checkpoint of a step would have left it; rows past it may be there."""
    copy = run.with_name(name)
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "skipped*"))
    here = f"step-{step:08d}"
    shutil.copytree(run / "checkpoints" / here, copy / "checkpoints" / here)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "status": "running"}))
    return copy
