"""Sampling with guidance: the field's one forward a step against a plain loop of two, one network, one run.

    python -m benchmarks.sampling [--width 128] [--steps 12] [--rounds 5] [--threads 1]

The network is a DDT (4 blocks of encoder, 2 of head) with untrained weights, on latents of 16 channels. The plain loop
is Euler's with a forward for each branch and a noise level for each row. Two numbers follow that change the samples:
guidance at u <= 0.7 alone, and the encoder run at a third of the steps besides. Writes ``sampling.jsonl`` and a section
of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.measuring import alternating, median_ratio
from vtp_core.clock import StepClock
from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.ode import Euler
from vtp_core.samplers.reuse import Reuse
from vtp_dit import DDT
from vtp_flow import Linear
from vtp_plugins import Spec

SIZES = ((1, 8), (4, 4), (16, 8))
"""Images at once and tokens along an axis."""
GOAL_AT = SIZES[0]
CLASSES, CHANNELS, SCALE, INTERVAL, CLOCK = 10, 16, 2.0, (0.0, 0.7), StepClock()


def main() -> None:
    """Measure, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows = [
        measure(images, side, arguments.width, arguments.steps, arguments.rounds, clock)
        for images, side in SIZES
    ]
    tables.save("sampling", [{"machine": tables.machine(), "seed": 0, **row} for row in rows])
    tables.write_section("sampling", section(rows, arguments))


def measure(
    images: int, side: int, width: int, steps: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Throughputs of one size, and how far the samples of both ways are apart."""
    spec = Spec(channels=CHANNELS, size=(side, side), patch=(1, 1), classes=CLASSES, condition="label")
    made = DDT(spec, width=width, heads=width // 64 or 1, encoder_blocks=4, head_blocks=2, patch=1)
    network, path = made.eval().requires_grad_(False), Linear(spec)
    for p in network.parameters():
        p.normal_(std=0.05)  # the last layer begins at zero, and would hide a difference
    shape, labels = (images, CHANNELS, side, side), torch.arange(images) % CLASSES

    def field(interval: tuple[float, float] = (0.0, 1.0), reuse: Reuse | None = None) -> Callable[[], Tensor]:
        guidance = Guidance(scale=SCALE, interval=interval)
        joined = Field(network, path, guidance=guidance, null=null, reuse=reuse)
        return lambda: Euler(spec, steps=steps)(joined, shape, labels, CLOCK)

    ways = [plain(network, shape, labels, steps), field(), field(INTERVAL)]
    ways.append(field(INTERVAL, Reuse(keep=-(-steps // 3))))
    apart = float((ways[0]() - ways[1]()).abs().max())
    times = alternating(ways, rounds, warm=1, clock=clock)
    seconds = [min(row[way] for row in times) for way in range(len(ways))]
    ratios = [median_ratio(times, 0, way) for way in range(len(ways))]
    return {
        "images": images, "tokens": side**2, "width": width, "steps": steps, "apart": apart,
        "images per second": [images / s for s in seconds], "ratios": ratios,
    }  # fmt: skip


def null(condition: Tensor) -> Tensor:
    """The null class of every row."""
    return torch.full_like(condition, CLASSES)


def plain(network: DDT, shape: tuple[int, ...], labels: Tensor, steps: int) -> Callable[[], Tensor]:
    """Euler's loop with a forward for each branch."""

    @torch.no_grad()
    def call() -> Tensor:
        x, levels = CLOCK.normal("noise", *shape), torch.linspace(1, 0, steps + 1)
        for u, after in pairwise(levels):
            own = u.expand(shape[0])  # () -> (R,)
            strong = network(x, own, labels)["prediction"]
            weak = network(x, own, null(labels))["prediction"]
            x = x + (after - u) * (weak + SCALE * (strong - weak))
        return x

    return call


def section(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """The lines between the README's markers."""
    head = [
        "images at once",
        "two passes",
        "one pass",
        "ratio",
        "goal",
        "u <= 0.7",
        "and reuse",
        "samples differ by",
    ]
    lines = []
    for row in rows:
        goal = ">= 1.3 x" if (row["images"], round(row["tokens"] ** 0.5)) == GOAL_AT else ""
        speeds = [f"{speed:.2f} / s" for speed in row["images per second"][:2]]
        ratios = [f"{ratio:.2f} x" for ratio in row["ratios"][1:]]
        lines.append(
            [f"{row['images']}, of {row['tokens']} tokens", *speeds, ratios[0], goal, *ratios[1:],
             f"{row['apart']:.0e}"]
        )  # fmt: skip
    first = rows[0]
    reused = f"the encoder at {-(-first['steps'] // 3)} of {first['steps']} steps"
    about = (
        f"DDT of width {first['width']}, 4 + 2 blocks, untrained; Euler, {first['steps']} steps, guidance everywhere; "
        f"{arguments.rounds} alternating rounds, medians of the ratio, seed 0, {tables.machine()}."
    )
    note = (
        f"All ratios are to two passes; *u <= 0.7* guides those levels alone, *and reuse* also runs {reused}."
    )
    return [about, "", *tables.table(head, lines), "", note]


if __name__ == "__main__":
    main()
