"""The numbers of a finished demo run, written into the README: ``python -m benchmarks.demo RUN``.

Beside each stands what the issue that asked for the demo wants (a throwaway prototype reached it), and for
neighbours the 8x8-pixel baseline, so that nobody is fooled.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import read

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- numbers:start -->", "<!-- numbers:end -->"
ROWS = [  # label, probe, split, asked for, baseline probe, percent
    ("PSNR of reconstructions, trained images", "reconstruction/psnr", "train", "22.5 dB", None, False),
    ("PSNR, unseen art style", "reconstruction/psnr", "unseen_style", "", None, False),
    ("LPIPS (AlexNet), unseen art style", "reconstruction/lpips", "unseen_style", "", None, False),
    (
        "FD-lite0 of reconstructions (not FID), unseen art style",
        "fd_lite0",
        "unseen_style",
        "",
        "fd_lite0/floor",
        False,
    ),
    ("text to image, top-1", "zero_shot/text_to_image_top1", "unseen_style", "15 %", None, True),
    ("image to text, top-1", "zero_shot/image_to_text_top1", "unseen_style", "", None, True),
    (
        "1-NN on CLS: same emoji",
        "knn/cls/concept@google",
        "unseen_style",
        "26 %",
        "knn/pixels8/concept@google",
        True,
    ),
    (
        "1-NN on CLS: same sub-category",
        "knn/cls/label@google",
        "unseen_style",
        "38 %",
        "knn/pixels8/label@google",
        True,
    ),
    (
        "1-NN on the latent: same emoji",
        "knn/latent/concept@google",
        "unseen_style",
        "",
        "knn/pixels8/concept@google",
        True,
    ),
    ("linear probe on CLS: sub-category", "linear/cls/label", "unseen_style", "", None, True),
    ("linear probe on CLS: sub-category, unseen emoji", "linear/cls/label", "unseen_concept", "", None, True),
]


def main() -> None:
    """Rewrite the README's table from a run directory."""
    run = RunDirectory.open(Path(sys.argv[1]))
    readings = {(row["probe"], row["split"]): row for row in read(run.probes)}  # the last of each wins
    metrics = read(run.metrics)
    seconds = sum(row["time/step"] for row in metrics)
    lines = ["| measured on the emoji data | value | asked for | baseline | n |", "|---|---:|---:|---:|---:|"]
    lines += [line for row in ROWS if (line := table_row(row, readings))]
    spent = run.record().get("seconds")
    whole = f", {spent / 60:.1f} minutes with evaluation and report" if isinstance(spent, float) else ""
    images = metrics[-1]["step"] * run.stack()["data"]["batch_size"]
    lines.append("")
    machine = run.environment()
    used = f"{machine['torch']['threads']} of {machine['platform']['cpus']} cores"
    lines.append(
        f"`make demo`: {metrics[-1]['step']} steps, {images:,} images, {seconds / 60:.1f} minutes of training on "
        f"{used}{whole}, seed {machine.get('seed')}. Every number with its protocol is in the report; the table is "
        "written by `benchmarks/demo.py`."
    )
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(before + "\n".join([START, *lines, END]) + rest.split(END)[1], encoding="utf-8")


def table_row(
    row: tuple[str, str, str, str, str | None, bool], readings: dict[tuple[str, str], dict[str, Any]]
) -> str:
    """One line of the table; empty when the run has no such reading."""
    label, probe, split, asked, baseline, percent = row
    reading = readings.get((probe, split))
    if reading is None:
        return ""
    base = readings.get((baseline, split)) if baseline else None
    other = ""
    if base is not None:
        other = f"{shown(base['value'], percent)} {'floor' if 'floor' in str(baseline) else '8x8 pixels'}"
    elif "chance of top-1 " in reading["protocol"]:
        other = "chance " + reading["protocol"].rpartition("chance of top-1 ")[2]
    return f"| {label} | {shown(reading['value'], percent)} | {asked} | {other} | {reading['n']} |"


def shown(value: float, percent: bool) -> str:
    """A number as people read it."""
    return f"{100 * value:.1f} %" if percent else f"{value:.2f}"


if __name__ == "__main__":
    main()
