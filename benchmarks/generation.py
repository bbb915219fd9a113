"""A finished generation pipeline in the README: ``python -m benchmarks.generation DIR``.

DIR is what ``make demo-generation`` left. The picture is docs/generation.png: eight labels chosen beforehand, the
first eight samples of seed 0 of each, none picked by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torchvision.transforms.functional import to_pil_image

from benchmarks.tables import table
from vtp_core.generation import Generator
from vtp_core.grids import grid_of
from vtp_core.run.directory import RunDirectory
from vtp_core.run.metrics import read

ROOT = Path(__file__).parent.parent
START, END = "<!-- samples:start -->", "<!-- samples:end -->"
LABELS = (
    "country flag", "face smiling", "face concerned", "geometric", "heart", "food fruit", "animal mammal", "clothing"
)  # fmt: skip
SAMPLES = 8
YARDSTICKS = {
    "fd_lite0": "samples",
    "fd_lite0/reconstructions": "reconstructions of the same images",
    "fd_lite0/floor": "floor: two halves of the images",
    "fd_lite0/noise": "decodes of pure noise",
}


def main() -> None:
    """Rewrite the README's section and the picture from a pipeline directory."""
    folder = Path(sys.argv[1])
    run = RunDirectory.open(stage(folder, "generator"))
    rows = [row for row in read(run.probes) if row["probe"].startswith("generation/")]
    lines = [*numbers(rows), "", *times(folder), "", f"![Samples]({picture(run.path).relative_to(ROOT)})", ""]
    lines.append(f"Rows: {', '.join(LABELS)}; the first {SAMPLES} samples of seed 0 of each.")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    readme.write_text(before + "\n".join([START, *lines, END]) + rest.split(END)[1], encoding="utf-8")


def stage(folder: Path, name: str) -> Path:
    """Where a stage's artefact lies."""
    record = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    return folder / str(record["stages"][name]["dir"])


def numbers(rows: list[dict[str, Any]]) -> list[str]:
    """FD through training with its yardsticks, and the other metrics at the end."""
    steps = sorted({row["step"] for row in rows})
    found = {(row["probe"].removeprefix("generation/"), row["step"]): row for row in rows}
    head = ["FD-lite0 against images of the trained split (not FID)", *(f"step {step}" for step in steps)]
    body = [
        [said, *(f"{found[name, step]['value']:.0f}" if (name, step) in found else "" for step in steps)]
        for name, said in YARDSTICKS.items()
    ]
    last = found["fd_lite0", steps[-1]]
    others = ", ".join(
        f"{name} {row['value']:.3g}"
        for (name, step), row in found.items()
        if step == steps[-1] and name not in YARDSTICKS
    )
    return [*table(head, body), "", f"At the end also {others}. Protocol: {last['protocol']}."]


def times(folder: Path) -> list[str]:
    """Seconds of every stage, and the machine."""
    record = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    spent = {name: entry.get("seconds") for name, entry in record["stages"].items()}
    said = ", ".join(f"{name} {seconds / 60:.1f} min" for name, seconds in spent.items() if seconds)
    used = RunDirectory.open(stage(folder, "generator")).environment()
    return [
        f"`make demo-generation`: {said}, on {used['torch']['threads']} of {used['platform']['cpus']} cores."
    ]


def picture(run: Path) -> Path:
    """docs/generation.png."""
    generator = Generator.from_pretrained(run)
    labels = [generator.label(label) for label in LABELS for _ in range(SAMPLES)]
    out = ROOT / "docs" / "generation.png"
    to_pil_image(grid_of(generator.sample(len(labels), labels), SAMPLES)).save(out, optimize=True)
    return out


if __name__ == "__main__":
    main()
