"""The engine's step against the textbook's at the same shapes: throughput, memory, and share of the GEMM rate.

    python -m benchmarks.step [--rounds 12] [--threads 1] [--stack vtp-tiny] [key=value ...]

Both ways start from the same weights and give the same loss, which is checked. Batches are noise, so no loader works
beside. Writes ``step.jsonl`` and a section of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import tables
from benchmarks.measuring import (
    PLAIN,
    alternating,
    batch_of,
    engine_of,
    median_ratio,
    peak_bytes,
    product,
    resident_peak,
)  # fmt: skip
from benchmarks.textbook_step import Step
from vtp_core.engine import Engine

SIDE = 2048  # of the large matrix product
WAYS = ("engine", "textbook")


def main() -> None:
    """Measure, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stack", default="vtp-tiny")
    parser.add_argument("--resident", choices=WAYS, help="only print how far memory grows; starts itself so")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = [*PLAIN, *arguments.overrides]
    if arguments.resident:
        ways = ways_of(engine_of(arguments.stack, overrides))
        print(resident_peak(lambda: [ways[arguments.resident]() for _ in range(3)]))
        return
    command = [*sys.argv[1:], "--resident"]
    grown = {
        way: int(subprocess.check_output([sys.executable, "-m", "benchmarks.step", *command, way]))
        for way in WAYS
    }
    row = {"stack": arguments.stack, **measure(engine_of(arguments.stack, overrides), arguments.rounds)}
    row |= {f"resident_{way}": size for way, size in grown.items()}
    tables.save("step", [row])
    tables.write_section("step", section(row))


def ways_of(engine: Engine) -> dict[str, Callable[[], float]]:
    """A step of each way, on one batch."""
    inputs, book = batch_of(engine), Step(engine)
    return {"engine": lambda: engine.step(inputs)["loss"], "textbook": lambda: book(inputs)}


def measure(engine: Engine, rounds: int) -> dict[str, Any]:
    """Every number of the section."""
    ways = ways_of(engine)
    calls = [ways[way] for way in WAYS]
    first = [call() for call in calls]
    if abs(first[0] - first[1]) > 1e-4 * abs(first[1]):
        raise AssertionError(f"the two ways differ: losses {first[0]} and {first[1]}")
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        calls[0]()
    products = counter.get_total_flops()
    saved = [saved_bytes(call) for call in calls]
    allocated = [peak_bytes(call) for call in calls]
    width = getattr(engine.model.encoder, "width", 0)
    timed = alternating([*calls, product(SIDE, SIDE, SIDE), product(4096, width, 3 * width)], rounds)
    fixed = (
        sum(p.numel() * p.element_size() for p in engine.optimizers.parameters()) * 3
    )  # gradients, two moments
    return {
        "machine": tables.machine(), "rounds": rounds, "seed": engine.train_keys.seed, "loss": first,
        "seconds": [statistics.median(r[i] for r in timed) for i in range(2)], "speed": median_ratio(timed, 1, 0),
        "products": products, "rate": products / statistics.median(r[0] for r in timed),
        "gemm": statistics.median(products / r[0] / (2 * SIDE**3 / r[2]) for r in timed),
        "narrow": statistics.median(2 * 4096 * 3 * width**2 / r[3] / (2 * SIDE**3 / r[2]) for r in timed),
        "saved": saved, "fixed": fixed, "allocated": allocated,
    }  # fmt: skip


def saved_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that autograd kept for a backward at one time; each storage once, parameters not at all."""
    users: dict[int, int] = {}
    held = peak = 0

    class Kept:
        """Counts a storage as long as it lives."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, peak
            self.tensor, self.storage = tensor, tensor.untyped_storage()
            self.key = 0 if tensor.is_leaf and tensor.requires_grad else self.storage._cdata
            users[self.key] = users.get(self.key, 0) + 1
            if self.key and users[self.key] == 1:
                held += self.storage.nbytes()
                peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            users[self.key] -= 1
            if self.key and not users[self.key]:
                held -= self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        call()
    return peak


def section(row: dict[str, Any]) -> list[str]:
    """The lines between the README's markers."""

    def ratio(key: str, extra: int = 0) -> float:
        return float((row[key][0] + extra) / (row[key][1] + extra))

    def line(what: str, ours: float, theirs: float, unit: str, found: str, goal: str = "") -> list[str]:
        return [what, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", found, goal]

    rows = [
        line(
            "time of a step",
            *(1e3 * s for s in row["seconds"]),
            "ms",
            f"{row['speed']:.2f} x as fast",
            ">= 1.8 x",
        )
    ]
    for what, key, extra, goal in (
        ("saved for backward, most at once", "saved", 0, ""),
        ("the same, gradients and moments", "saved", row["fixed"], "<= 0.60"),
        ("allocated in a step, most at once", "allocated", 0, ""),
    ):
        ours, theirs = ((size + extra) / 2**20 for size in row[key])
        rows.append(line(what, ours, theirs, "MiB", f"{ratio(key, extra):.2f}", goal))
    grown = [row[f"resident_{way}"] / 2**20 for way in WAYS]
    rows.append(line("growth of a fresh process", *grown, "MiB", f"{grown[0] / grown[1]:.2f}", "<= 0.60"))
    note = (
        f"Matrix products, convolutions and attention of an engine's step are {row['products'] / 1e9:.1f} GFLOP, done at "
        f"{row['rate'] / 1e9:.0f} GFLOP/s: {row['gemm']:.0%} of the rate of a 2048 x 2048 product timed in every round "
        f"(goal >= 75 %; a 4096-row product at the stack's own width reaches {row['narrow']:.0%})."
    )
    head = f"`{row['stack']}`, noise, {row['rounds']} alternating rounds, medians, seed {row['seed']}, {row['machine']}."
    return [head, "", *tables.table(["", "engine", "textbook", "ratio", "goal"], rows), "", note]


if __name__ == "__main__":
    main()
