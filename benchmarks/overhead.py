"""What the engine, its hooks, the loader and the command line cost beside the mathematics.

    python -m benchmarks.overhead [--rounds 200] [--steps 12] [--stack vtp-tiny] [key=value ...]

The engine's own time is its step on modules of no cost, less the same step written out by hand. Writes
``overhead.jsonl`` and a section of ``README.md`` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.measuring import PLAIN, alternating, batch_of, engine_of, seconds
from benchmarks.toys import STACK, Watch, by_hand
from vtp_core import load_stack
from vtp_core.build import blueprint, build
from vtp_core.data.loader import Loader
from vtp_core.engine import Engine
from vtp_core.evaluation import dataset_factory
from vtp_core.forwards import Inputs
from vtp_core.stack import check_stack
from vtp_plugins.registry import Registry


def main() -> None:
    """Measure, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="steps of toy modules")
    parser.add_argument("--steps", type=int, default=12, help="steps of the stack")
    parser.add_argument("--stack", default="vtp-tiny")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    row: dict[str, Any] = {
        "stack": arguments.stack,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "seed": 0,
    }
    row |= {command: wall(command) for command in ("--help", "list")}
    torch.set_num_threads(1)
    row |= {"machine": tables.machine(), **engine_time(arguments.rounds)}
    row |= loader_time(arguments.stack, [*PLAIN, *arguments.overrides], arguments.steps)
    tables.save("overhead", [row])
    tables.write_section("overhead", section(row))


def wall(command: str) -> float:
    """Median wall seconds of ``vtp COMMAND`` over five calls."""
    call = [sys.executable, "-m", "vtp_core", command]
    return statistics.median(
        seconds(lambda: subprocess.run(call, capture_output=True, check=True)) for _ in range(5)
    )


def engine_time(rounds: int) -> dict[str, float]:
    """Seconds of a toy step by the engine, with an idle hook plugin, and by hand."""
    stack = check_stack("toys", STACK, Registry([Path(__file__).with_name("toys.py")]))
    plain = Engine(build(blueprint(stack)), stack.train, stack.data.batch_size)
    watched = Engine(build(blueprint(stack)), stack.train, stack.data.batch_size, hooks={"watch": Watch()})
    inputs = batch_of(plain)
    calls = [by_hand(plain, inputs), lambda: plain.step(inputs), lambda: watched.step(inputs)]
    found = alternating(calls, rounds, warm=20, clock=time.process_time)
    named = zip(("by_hand", "engine", "hooked"), zip(*found, strict=True), strict=True)
    return {name: statistics.median(times) for name, times in named}


def loader_time(stack: str, overrides: list[str], steps: int) -> dict[str, float]:
    """Seconds of a step and of the wait for its batch, in a loop as training has it; and of making a batch."""
    engine, loaded = engine_of(stack, overrides), load_stack(stack, overrides)
    views, rows = engine.model.views, engine.layout.rows_by_view()
    dataset = dataset_factory(loaded, engine.model.spec)(None)
    chosen = {name: view for name, view in views.items() if name in rows}

    def loader(workers: int) -> Loader:
        size = loaded.data.batch_size
        return Loader(dataset, chosen, rows, batch_size=size, workers=workers, stop=steps + 2)

    with contextlib.closing(iter(loader(0))) as batches:
        made = [seconds(lambda: next(batches)) for _ in range(steps)]
    waits, works = [], []
    with contextlib.closing(iter(loader(loaded.data.workers))) as batches:
        for _ in range(steps + 2):
            began = time.perf_counter()
            batch = next(batches)
            fetched = time.perf_counter()
            engine.step(Inputs({k: v for k, v in batch.values.items() if k in views}, {}))
            waits.append(fetched - began)
            works.append(time.perf_counter() - fetched)
    return {
        "step": statistics.median(works[2:]), "wait": statistics.median(waits[2:]),
        "batch": statistics.median(made), "workers": loaded.data.workers,
    }  # fmt: skip


def section(row: dict[str, Any]) -> list[str]:
    """The lines between the README's markers."""
    own, hooks = row["engine"] - row["by_hand"], row["hooked"] - row["engine"]
    share = f"of a `{row['stack']}` step of {1e3 * row['step']:.0f} ms"
    lines = [
        [
            "engine: five objectives, four encoder forwards, two stages",
            f"{1e6 * own:.0f} us",
            f"{own / row['step']:.2%} {share}",
            "< 1 % with hooks",
        ],
        ["an idle hook plugin", f"{1e6 * hooks:.0f} us", f"{hooks / row['step']:.2%}", ""],
        [
            "wait for data",
            f"{1e3 * row['wait']:.1f} ms",
            f"{row['wait'] / (row['wait'] + row['step']):.2%}",
            "< 5 %",
        ],
        ["a batch by one worker", f"{1e3 * row['batch']:.0f} ms", f"{row['batch'] / row['step']:.0%}", ""],
        ["`vtp --help`", f"{row['--help']:.2f} s", "", "< 0.7 s"],
        ["`vtp list`", f"{row['list']:.2f} s", "", "< 0.7 s"],
    ]
    head = (
        f"Medians of {row['rounds']} toy steps (processor time), {row['steps']} steps of the stack with "
        f"{row['workers']} worker, 5 commands; seed {row['seed']}, {row['machine']}. The engine's own time is a toy "
        f"step ({1e6 * row['engine']:.0f} us) less the same by hand ({1e6 * row['by_hand']:.0f} us)."
    )
    return [head, "", *tables.table(["", "takes", "share", "goal"], lines)]


if __name__ == "__main__":
    main()
