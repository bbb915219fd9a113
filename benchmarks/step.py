"""The engine's step against the textbook's at the same shapes: throughput, memory, and share of the GEMM rate.

    python -m benchmarks.step [--rounds 12] [--threads 1] [key=value ...]

The stack is vtp-tiny, with all objectives on and targets as in the paper. Both ways start from the same weights and
give the same loss, which is checked. Batches are noise, so no loader works beside. With one thread, times are of the
processor. Writes ``step.jsonl`` and a section of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measuring as ask
from benchmarks import tables
from benchmarks.textbook_step import Step
from vtp_core.engine import Engine

SIDE = 2048  # of the large matrix product
WAYS = ("engine", "textbook")
STACK = "vtp-tiny"
RECIPE = [
    "objectives.dino.start=0", "objectives.dino.centering=sinkhorn", "objectives.dino.local_crops=4",
    "objectives.ibot.centering=sinkhorn", "objectives.reconstruction.l2=0",
]  # fmt: skip


def main() -> None:
    """Measure, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resident", choices=WAYS, help="only print how far memory grows; starts itself so")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = [*ask.PLAIN, *RECIPE, *arguments.overrides]
    if arguments.resident:
        ways = ways_of(ask.engine_of(STACK, overrides))
        print(ask.resident_peak(lambda: [ways[arguments.resident]() for _ in range(3)]))
        return
    command = [*sys.argv[1:], "--resident"]
    grown = {
        way: int(subprocess.check_output([sys.executable, "-m", "benchmarks.step", *command, way]))
        for way in WAYS
    }
    row = {
        "stack": STACK,
        "overrides": arguments.overrides,
        **measure(ask.engine_of(STACK, overrides), arguments.rounds),
    }
    row |= {f"resident_{way}": size for way, size in grown.items()}
    tables.save("step", [row])
    tables.write_section("step", section(row))


def ways_of(engine: Engine) -> dict[str, Callable[[], float]]:
    """A step of each way, on one batch."""
    inputs, book = ask.batch_of(engine), Step(engine)
    return {"engine": lambda: engine.step(inputs)["loss"], "textbook": lambda: book(inputs)}


def measure(engine: Engine, rounds: int) -> dict[str, Any]:
    """Every number of the section."""
    ways = ways_of(engine)
    calls: list[Callable[[], Any]] = [ways[way] for way in WAYS]
    first = [call() for call in calls]
    if abs(first[0] - first[1]) > 1e-4 * abs(first[1]):
        raise AssertionError(f"the two ways differ: losses {first[0]} and {first[1]}")
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # as products that are counted
    with math, FlopCounterMode(display=False) as counter:
        calls[0]()
    products = counter.get_total_flops()
    saved = [ask.saved_bytes(call) for call in calls]
    allocated = [ask.peak_bytes(call) for call in calls]
    width = getattr(engine.model.encoder, "width", 0)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls += [ask.product(SIDE, SIDE, SIDE), ask.product(4096, width, 3 * width)]
    timed = ask.alternating(calls, rounds, clock=clock)
    fixed = 3 * sum(
        p.numel() * p.element_size() for p in engine.optimizers.parameters()
    )  # gradients, moments
    return {
        "machine": tables.machine(), "rounds": rounds, "seed": engine.train_keys.seed, "loss": first,
        "seconds": [statistics.median(r[i] for r in timed) for i in range(2)], "speed": ask.median_ratio(timed, 1, 0),
        "products": products, "rate": products / statistics.median(r[0] for r in timed),
        "gemm": statistics.median(products / r[0] / (2 * SIDE**3 / r[2]) for r in timed),
        "narrow": statistics.median(2 * 4096 * 3 * width**2 / r[3] / (2 * SIDE**3 / r[2]) for r in timed),
        "saved": saved, "fixed": fixed, "allocated": allocated,
    }  # fmt: skip


def section(row: dict[str, Any]) -> list[str]:
    """The lines between the README's markers."""

    def line(what: str, pair: Sequence[float], unit: str, goal: str = "") -> list[str]:
        """A faster step has the larger ratio, a smaller memory the smaller one."""
        found = f"{row['speed']:.2f} x as fast" if unit == "ms" else f"{pair[0] / pair[1]:.2f}"
        return [what, *(f"{value:,.0f} {unit}" for value in pair), found, goal]

    def mib(sizes: Sequence[int], extra: int = 0) -> list[float]:
        return [(size + extra) / 2**20 for size in sizes]

    rows = [
        line("time of a step", [1e3 * s for s in row["seconds"]], "ms", ">= 1.8 x"),
        line("saved for backward, most at once", mib(row["saved"]), "MiB"),
        line("the same, gradients and moments", mib(row["saved"], row["fixed"]), "MiB", "<= 0.60"),
        line("allocated in a step, most at once", mib(row["allocated"]), "MiB"),
        line("growth of a fresh process", mib([row[f"resident_{way}"] for way in WAYS]), "MiB", "<= 0.60"),
    ]
    note = (
        f"Matrix products, convolutions and attention of an engine's step are {row['products'] / 1e9:.1f} GFLOP, "
        f"done at {row['rate'] / 1e9:.0f} GFLOP/s: {row['gemm']:.0%} of the rate of a 2048 x 2048 product timed in "
        f"every round (goal >= 75 %; a 4096-row product at the stack's own width reaches {row['narrow']:.0%})."
    )
    what = " ".join([f"`{row['stack']}`", *RECIPE, *row["overrides"]])
    head = (
        f"{what}; noise, {row['rounds']} alternating rounds, medians, seed {row['seed']}, {row['machine']}."
    )
    return [head, "", *tables.table(["", "engine", "textbook", "ratio", "goal"], rows), "", note]


if __name__ == "__main__":
    main()
