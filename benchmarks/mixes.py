"""Objective mixes at an equal budget: AE, CLIP+AE, SSL+AE, CLIP+SSL+AE from one stack (arXiv 2512.13687, 4).

    python -m benchmarks.mixes [--steps 300] [--stack vtp-tiny] [key=value ...]

Every mix trains for the same floating-point operations: those that the full mix spends in ``--steps`` steps, as
``vtp plan`` counts them. Writes ``mixes.jsonl`` and the table of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from benchmarks import tables
from vtp_core import load_stack, plan
from vtp_core.beginning import train
from vtp_core.run.metrics import read

MIXES = {
    "AE": ("clip", "dino", "ibot", "koleo"),
    "CLIP+AE": ("dino", "ibot", "koleo"),
    "SSL+AE": ("clip",),
    "CLIP+SSL+AE": (),
}
COLUMNS = {
    "PSNR": "reconstruction/psnr",
    "text to image": "zero_shot/text_to_image_top1",
    "same emoji, CLS": "knn/cls/concept@google",
    "same emoji, latent": "knn/latent/concept@google",
    "same emoji, 8x8 pixels": "knn/pixels8/concept@google",
    "sub-category, CLS": "knn/cls/label@google",
    "sub-category, linear on CLS": "linear/cls/label",
    "sub-category, linear on latent": "linear/latent/label",
}
SPLIT = "unseen_style"


def main() -> None:
    """Train every mix, write the numbers, rewrite the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="steps of the full mix")
    parser.add_argument("--stack", default="vtp-tiny")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    shared = [*arguments.overrides, "hooks=null", "probes.reconstruction.every=null"]
    budget = flops(arguments.stack, shared) * arguments.steps
    rows = [measure(name, dropped, arguments.stack, shared, budget) for name, dropped in MIXES.items()]
    tables.save("mixes", rows)
    write_table(rows)


def overrides_of(dropped: tuple[str, ...], shared: list[str]) -> list[str]:
    """The stack without some objectives."""
    return [*shared, *(f"objectives.{name}=null" for name in dropped)]


def flops(stack: str, overrides: list[str]) -> int:
    """Floating-point operations of one step, as planned."""
    return int(plan(load_stack(stack, overrides)).costs.step_flops)


def measure(
    name: str, dropped: tuple[str, ...], stack: str, shared: list[str], budget: int
) -> dict[str, Any]:
    """Train one mix for the budget and read its last probes."""
    overrides = overrides_of(dropped, shared)
    steps = max(round(budget / flops(stack, overrides)), 1)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [*overrides, f"train.steps={steps}", f"run.dir={folder}/run"]
        for probe in load_stack(stack, shared).section("probes"):
            chosen.append(f"probes.{probe}.every=null")
        began = time.perf_counter()
        run = train(load_stack(stack, chosen))
        seconds = time.perf_counter() - began
        readings = [row for row in read(run.probes) if row["step"] == steps]
        environment = run.environment()
    return {
        "mix": name, "stack": stack, "steps": steps, "gflop": budget / 1e9, "seconds": round(seconds, 1),
        "machine": tables.machine(), "data": environment.get("data"),
        "seed": environment.get("seed"), "readings": readings,
    }  # fmt: skip


def value(row: dict[str, Any], probe: str) -> dict[str, Any] | None:
    """A reading of a row on the split of the table."""
    found = [r for r in row["readings"] if r["probe"] == probe and r["split"] == SPLIT]
    return found[0] if found else None


def write_table(rows: list[dict[str, Any]]) -> None:
    """Replace the section of the README."""
    cells = []
    for row in rows:
        readings = [value(row, probe) for probe in COLUMNS.values()]
        shown = [
            "-" if r is None else f"{r['value']:.{'2f' if 'psnr' in r['probe'] else '1%'}}" for r in readings
        ]
        cells.append([row["mix"], str(row["steps"]), f"{row['seconds']:.0f}", *shown])
    first = rows[0]
    notes = [
        f"- {label}: {r['protocol']}" for label, probe in COLUMNS.items() if (r := value(rows[-1], probe))
    ]
    head = (
        f"`{first['stack']}`, {first['gflop']:,.0f} GFLOP of training each, split `{SPLIT}`, seed {first['seed']}, "
        f"{first['machine']}."
    )
    table = tables.table(["mix", "steps", "seconds", *COLUMNS], cells)
    tables.write_section("mixes", [head, "", *table, "", *notes])


if __name__ == "__main__":
    main()
