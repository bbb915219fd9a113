"""Samples as one picture: ``vtp generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

from vtp_core.errors import StackFault
from vtp_core.files import write_picture
from vtp_core.generation import Generator
from vtp_plugins.registry import Registry


def generate_grid(
    run: Path, out: Path, *, n: int = 16, labels: Sequence[str] = (), texts: Sequence[str] = (), seed: int = 0,
    weights: str | None = None, overrides: Sequence[str] = (), registry: Registry | None = None,
) -> str:  # fmt: skip
    """Sample ``n`` pictures into one PNG grid; sample i of a seed is the same in every call and run.

    Args:
        run: whose generator samples.
        out: PNG file to write.
        n: samples, for each label or text in turn.
        labels: names or numbers; none draws a label for every sample.
        texts: captions.
        seed: of noise and drawn labels.
        weights: ``ema`` or ``student``.
        overrides: of the run's stack, such as ``sampler.steps=20``.
        registry: what the names of the stack mean; by default what is installed.

    Returns:
        A line with the file, the sampler and the evaluations per sample.

    Raises:
        StackFault: labels and texts at once, or what the generator is not conditioned on.
        StorageFault: the file cannot be written.
    """
    if labels and texts:
        raise StackFault("--label and --text cannot be joined: a generator is conditioned on one of them")
    if n < max(len(labels), len(texts)):
        raise StackFault(f"--n {n}: fewer samples than the {max(len(labels), len(texts))} labels or texts")
    generator = Generator.from_pretrained(run, weights, overrides=overrides, registry=registry)
    indices = [generator.label(labels[i % len(labels)]) for i in range(n)] if labels else None
    captions = [texts[i % len(texts)] for i in range(n)] if texts else None
    images = generator.sample(n, indices, captions, seed)
    write_picture(out, grid_of(images))
    used = generator.evaluations
    fresh = f" ({generator.refreshes} of them with its encoder)" if generator.refreshes < used else ""
    return f"{out}: {n} samples, seed {seed}, {used} evaluations each{fresh} | {generator.protocol}"


def grid_of(images: Tensor, columns: int | None = None) -> Tensor:
    """Pictures (n, 3, H, W) in rows, (3, h, w) uint8, with a white border."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    shown: Tensor = make_grid(images.clamp(0, 1), nrow=columns, padding=2, pad_value=1.0)
    return (shown * 255).round().to(torch.uint8)
