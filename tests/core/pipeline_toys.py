"""A pipeline of toys: the plugin file that it names, its stacks, and what tests ask of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import toy_objectives

from vtp_core.data.order import permutation
from vtp_core.pipeline.directory import PipelineDirectory, read_record
from vtp_core.pipeline.running import resume_pipeline, run_pipeline
from vtp_plugins import Clock, Spec
from vtp_plugins.hookspecs import hookimpl
from vtp_plugins.registry import Registry

REST = """
data: {use: dots, batch_size: 8, workers: 0}
views: {image: {use: plain}}
train: {steps: 4, seed: 0, checkpoint_every: 1}
"""
FILES = {
    "tokenizer.yaml": f"""
modality: image
encoder: {{use: vit, patch: 4, image_size: 8, width: 16, depth: 1, heads: 1}}
bottleneck: {{use: linear, channels: 4}}
decoder: {{use: vit_pixels, width: 16, depth: 1, heads: 1}}
objectives: {{rebuild: {{}}}}
{REST}""",
    "decoder.yaml": f"""
tokenizer: {{frozen: [encoder, bottleneck]}}
objectives: {{rebuild: {{}}}}
{REST}""",
    "generator.yaml": f"""
tokenizer: {{frozen: [encoder, bottleneck, decoder]}}
generator: {{use: denoiser, path: {{use: linear}}, condition: label, drop_condition: 0.1}}
objectives: {{drift: {{}}}}
{REST}""",
    "chain.yaml": """
stages:
  tokenizer: {stack: tokenizer.yaml}
  decoder: {stack: decoder.yaml, tokenizer: tokenizer, with: {train.steps: 3}}
  latents: {latents: {flip: true, shard_size: 10}, tokenizer: decoder}
  generator: {stack: generator.yaml, tokenizer: decoder, data: latents}
""",
}
STAGES = ["tokenizer", "decoder", "latents", "generator"]


class Bench:
    """A working directory with the pipeline's files; keeps the lines of the last run.

    Attributes:
        source: the pipeline.
        path: its directory.
        plugin: the file with its components.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (folder / name).write_text(text, encoding="utf-8")
        self.folder, self.source, self.path = folder, folder / "chain.yaml", folder / "runs" / "chain"
        self.plugin = Path(__file__)
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def run(self, *overrides: str, source: Path | None = None) -> PipelineDirectory:
        self.lines.clear()
        where = f"run.dir={self.path}"
        return run_pipeline(source or self.source, [where, *overrides], Registry([self.plugin]), self.note)

    def resume(self) -> PipelineDirectory:
        self.lines.clear()
        return resume_pipeline(self.path, Registry([self.plugin]), self.note)

    @property
    def ran(self) -> list[str]:
        """Stages that the last run did not skip."""
        heads = [line for line in self.lines if line.startswith("stage ") and "/" in line.split()[1]]
        return [line.split()[2].rstrip(":") for line in heads if "skipped" not in line]

    @property
    def artefacts(self) -> dict[str, str | None]:
        """Hash of each stage that was begun."""
        stages = read_record(self.path / "pipeline.json")["stages"]
        return {name: entry["artefact"] for name, entry in stages.items()}


class Dots:
    """Forty pictures of noise, with labels."""

    fields = frozenset({"image", "label", "name"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train",)
    names: Mapping[str, Sequence[str]] = {"label": ["even", "odd"]}

    def __init__(self, spec: Spec, split: str = "train", *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pictures = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.pictures[index], "label": index % 2, "name": str(index)}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        return f"dots {self.seed}"


class Signal:
    """Signals its own process after some steps; with a sign on disk, only once."""

    def __init__(self, spec: Spec, *, at: int, number: str = "SIGKILL", sign: str = "") -> None:
        self.at, self.number, self.sign = at, signal.Signals[number], Path(sign) if sign else None

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Clock, metrics: Mapping[str, float]) -> None:
        if metrics["step"] + 1 >= self.at and not (self.sign and self.sign.exists()):
            if self.sign:
                self.sign.touch()
            os.kill(os.getpid(), self.number)


PLUGINS = {**toy_objectives.PLUGINS, "datasets": {"dots": Dots}, "hooks": {"signal": Signal}}
