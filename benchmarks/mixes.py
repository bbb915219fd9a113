"""Objective mixes at an equal budget: AE, CLIP+AE, SSL+AE, CLIP+SSL+AE from one stack (arXiv 2512.13687, section 4).

    python benchmarks/mixes.py [--steps 300] [--stack vtp-tiny] [key=value ...]

Every mix trains for the same floating-point operations: those that the full mix spends in ``--steps`` steps, as
``vtp plan`` counts them. Writes ``mixes.jsonl`` and the table of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from vtp_core import load_stack, plan
from vtp_core.run.metrics import read
from vtp_core.training import train

HERE = Path(__file__).parent
MIXES = {
    "AE": ("clip", "dino", "ibot", "koleo"),
    "CLIP+AE": ("dino", "ibot", "koleo"),
    "SSL+AE": ("clip",),
    "CLIP+SSL+AE": (),
}
COLUMNS = {
    "PSNR": "reconstruction/psnr",
    "text to image": "zero_shot/text_to_image_top1",
    "same emoji, CLS": "knn/cls_concept",
    "same emoji, latent": "knn/latent_concept",
    "sub-category, CLS": "knn/cls_label",
    "sub-category, linear on latent": "linear/latent",
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
    (HERE / "mixes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_table(rows)


def overrides_of(dropped: tuple[str, ...], shared: list[str]) -> list[str]:
    """The stack without some objectives."""
    return [*shared, *(f"objectives.{name}=null" for name in dropped)]


def flops(stack: str, overrides: list[str]) -> int:
    """Floating-point operations of one step, as planned."""
    return int(plan(load_stack(stack, overrides)).costs.step_flops)


def measure(name: str, dropped: tuple[str, ...], stack: str, shared: list[str], budget: int) -> dict[str, Any]:
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
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "data": environment.get("data"),
        "seed": environment.get("seed"), "readings": readings,
    }  # fmt: skip


def value(row: dict[str, Any], probe: str) -> dict[str, Any] | None:
    """A reading of a row on the split of the table."""
    found = [r for r in row["readings"] if r["probe"] == probe and r["split"] == SPLIT]
    return found[0] if found else None


def write_table(rows: list[dict[str, Any]]) -> None:
    """Replace the table between the markers of the README."""
    lines = ["| mix | steps | seconds | " + " | ".join(COLUMNS) + " |", "|---|---:|---:|" + "---:|" * len(COLUMNS)]
    for row in rows:
        cells = []
        for probe in COLUMNS.values():
            reading = value(row, probe)
            cells.append("-" if reading is None else f"{reading['value']:.2f}" if "psnr" in probe else f"{reading['value']:.1%}")
        lines.append(f"| {row['mix']} | {row['steps']} | {row['seconds']:.0f} | " + " | ".join(cells) + " |")
    notes = sorted({f"- {label}: {r['protocol']}" for row in rows for label, probe in COLUMNS.items() if (r := value(row, probe))})
    head = f"`{rows[0]['stack']}`, {rows[0]['gflop']:,.0f} GFLOP each, split `{SPLIT}`, seed {rows[0]['seed']}, {rows[0]['machine']}."
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- mixes:start -->", "<!-- mixes:end -->"
    before, after = text.split(start)[0], text.split(end)[1]
    readme.write_text(before + "\n".join([start, head, "", *lines, "", *notes, end]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
