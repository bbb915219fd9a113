"""Losses over many scores, in blocks against whole matrices: extra memory, gradients, time.

    python -m benchmarks.losses [--rows 512] [--prototypes 131072] [--pairs 32768] [--threads 1]

The prototype loss is iBOT's, Sinkhorn targets included; the contrastive loss is CLIP's. Extra memory is the most that a
call holds beside its gradients. Whole matrices of all pairs don't fit everywhere, so they are measured at a quarter of
the pairs and counted 16 times. Writes ``losses.jsonl`` and a section of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import tables
from benchmarks.measuring import alternating, median_ratio, peak_bytes
from benchmarks.textbook_step import cross_entropy
from benchmarks.textbook_step import sinkhorn as whole_sinkhorn
from vtp_core.clock import StepClock
from vtp_core.nn.chunked import contrastive, cross_entropy_terms
from vtp_core.nn.sinkhorn import sinkhorn

Loss = Callable[..., Tensor]
WIDTH, TEMPERATURE, CLOCK = 256, 0.07, StepClock()


def main() -> None:
    """Measure, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512, help="masked patches")
    parser.add_argument("--prototypes", type=int, default=131072)
    parser.add_argument("--pairs", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = [prototypes(arguments.rows, arguments.prototypes), pairs(arguments.pairs)]
    tables.save("losses", [{"machine": tables.machine(), "seed": 0, **row} for row in rows])
    tables.write_section("losses", section(rows, arguments.rows))


def unit(rows: int, width: int) -> Tensor:
    """Features on the unit sphere, (rows, width)."""
    return F.normalize(torch.randn(rows, width), dim=-1)


def prototypes(rows: int, count: int) -> dict[str, Any]:
    """iBOT's loss of ``rows`` patches over ``count`` prototypes."""
    teacher, prior = unit(rows, WIDTH), unit(count, WIDTH)

    def blocks(x: Tensor, weight: Tensor) -> Tensor:
        targets = sinkhorn(teacher, prior, TEMPERATURE, CLOCK)
        normaliser, mean = cross_entropy_terms(x / 0.1, weight, targets)
        return (normaliser - (x / 0.1 * mean).sum(-1)).mean()

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            targets = whole_sinkhorn(teacher @ prior.T, TEMPERATURE)
        return cross_entropy(x @ weight.T, targets).mean()

    given = [unit(rows, WIDTH), unit(count, WIDTH)]
    ways = [graded(blocks, given), graded(whole, given)]
    extra = [peak_bytes(way) - held(given) for way in ways]
    times = alternating(ways, rounds=3, warm=0)
    return {
        "loss": "prototypes", "scores": [rows, count], "width": WIDTH, "extra": extra, "scaled": 1,
        "difference": difference(*(way() for way in ways)), "time": median_ratio(times),
    }  # fmt: skip


def pairs(count: int) -> dict[str, Any]:
    """CLIP's loss of ``count`` pairs; the whole matrix at a quarter of them."""
    scale = torch.tensor(50.0)

    def blocks(a: Tensor, b: Tensor) -> Tensor:
        return contrastive(a, b, scale, CLOCK)

    def whole(a: Tensor, b: Tensor) -> Tensor:
        scores, own = scale * a @ b.T, torch.arange(len(a))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2

    width, few = WIDTH // 2, count // 4
    given, part = [unit(count, width) for _ in "ab"], [unit(few, width) for _ in "ab"]
    ways = [graded(blocks, part), graded(whole, part)]
    return {
        "loss": "pairs", "scores": [count, count], "width": width, "scaled": 16,
        "extra": [peak_bytes(graded(blocks, given)) - held(given), 16 * (peak_bytes(ways[1]) - held(part))],
        "difference": difference(*(way() for way in ways)), "time": median_ratio(alternating(ways, rounds=3, warm=0)),
    }  # fmt: skip


def graded(loss: Loss, given: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call that takes the loss and its gradients."""

    def call() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        return list(torch.autograd.grad(loss(*leaves), leaves))

    return call


def held(tensors: list[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference of gradients over the largest gradient."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def section(rows: list[dict[str, Any]], patches: int) -> list[str]:
    """The lines between the README's markers."""
    head = ["loss", "in blocks", "whole matrices", "memory", "goal", "gradients differ by", "goal", "time"]
    named = {"prototypes": f"{patches:,} masked patches, {{1:,}} prototypes", "pairs": "{0:,} pairs"}
    lines = []
    for row in rows:
        ours, theirs = (f"{size / 2**20:,.0f} MiB" for size in row["extra"])
        share = f"{row['extra'][0] / row['extra'][1]:.1%}"
        found = [f"{row['difference']:.1e}", "<= 1e-5", f"{row['time']:.2f} x"]
        mark = " *" if row["scaled"] > 1 else ""
        lines.append(
            [named[row["loss"]].format(*row["scores"]), ours, theirs + mark, share, "<= 15 %", *found]
        )
    note = "\\* measured at a quarter of the pairs, times 16; gradients and time are of that quarter."
    return [f"Float32, seed 0, {tables.machine()}.", "", *tables.table(head, lines), "", note]


if __name__ == "__main__":
    main()
