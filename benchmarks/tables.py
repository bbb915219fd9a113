"""Where benchmarks leave their numbers: JSON lines beside the script and a marked section of README.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def save(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``<name>.jsonl``."""
    (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def machine() -> str:
    """Processor, cores used and torch, for the line over a table."""
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {cores} thread{'s'[: cores > 1]}, torch {torch.__version__}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; every column but the first is flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def write_section(name: str, lines: Sequence[str], page: Path = HERE / "README.md") -> None:
    """Replace what stands between ``<!-- NAME:start -->`` and ``<!-- NAME:end -->`` in the README or another page."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    page.write_text(before + "\n".join([start, *lines, end]) + rest.split(end)[1], encoding="utf-8")
