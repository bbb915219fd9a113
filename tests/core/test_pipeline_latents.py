"""A pipeline to its end: a tokenizer, its decoder, latents of it, and a generator that trains on them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import STACK

from vtp_core.errors import StackFault
from vtp_core.latents import writer
from vtp_core.pipeline.directory import PipelineDirectory, read_record
from vtp_core.pipeline.running import resume_pipeline, run_pipeline
from vtp_core.run import checkpoint
from vtp_core.stopping import Preempted
from vtp_plugins.registry import Registry

TOYS = Path(__file__).with_name("toy_objectives.py")
PIPELINE = """
stages:
  tokenizer:
    stack: small.yaml
    with: {objectives.clip: null, objectives.dino: null, objectives.ibot: null, objectives.koleo: null}
  latents: {latents: {flip: true, shard_size: 800}, tokenizer: tokenizer}
  generator: {stack: generator.yaml, tokenizer: tokenizer, data: latents}
"""
GENERATOR = """
data: {use: emoji, batch_size: 16, workers: 0}
tokenizer: {frozen: [encoder, bottleneck, decoder]}
generator: {use: denoiser, path: {use: straight}}
objectives: {drift: {weight: 1.0}}
train: {steps: 4, seed: 0, checkpoint_every: 1}
"""


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(STACK, encoding="utf-8")
    (folder / "generator.yaml").write_text(GENERATOR, encoding="utf-8")
    (folder / "three.yaml").write_text(PIPELINE, encoding="utf-8")
    return folder / "three.yaml"


def test_x(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    d = run_pipeline(write(tmp_path), [], Registry([TOYS]))
    print((d.path / "pipeline.json").read_text())
    d = run_pipeline(write(tmp_path), [], Registry([TOYS]))
    d = run_pipeline(write(tmp_path), ["latents.flip=false"], Registry([TOYS]))
    print((d.path / "pipeline.yaml").read_text())
    d = resume_pipeline(d.path, Registry([TOYS]))
