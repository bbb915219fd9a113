"""What a plan estimates against what a real step holds: weights, gradients, optimizer state, what autograd keeps.

    python -m benchmarks.memory [NAME ...]

NAME picks cases by a part of their name. Real steps are taken by the engine on the stacks' own data, by one process
and by two over gloo; bytes are summed over tensors, what autograd keeps is counted by its hooks on saved tensors, as
most storages alive at one time, and all that a step holds at one time by torch's profiler, as the least of three
steps. Writes ``memory.jsonl`` beside this file and the section ``memory`` of ``docs/distributed.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks import tables
from benchmarks.measuring import peak_bytes
from vtp_core import load_stack, train
from vtp_core.adopting import adopt, conditioning, earlier
from vtp_core.build import blueprint, build, spec_of
from vtp_core.costs import cost
from vtp_core.dryrun.captions import LONG
from vtp_core.dryrun.measuring import measure
from vtp_core.engine import Engine
from vtp_core.evaluation import dataset_factory
from vtp_core.fields import loader_of
from vtp_core.forwards import Inputs
from vtp_core.stack import Stack

KINDS = ("parameters", "gradients", "optimizer", "averages", "saved", "peak")
STEPS = 3  # of which the one that holds least is told
DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
PLAIN = ["data.use=emoji", "data.workers=0", "probes=null", "hooks=null"]
SMALL = [
    "data.batch_size=16", "encoder.image_size=64", "encoder.depth=4", "decoder.width=256",
    "decoder.depth=2", "decoder.heads=4", "modules.prototypes.prototypes=4096", "objectives.clip.width=256",
    "objectives.clip.depth=3", "objectives.clip.heads=4", "objectives.reconstruction.rows=0.25",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One stack in one mode.

    Attributes:
        worlds: numbers of processes.
        after: whether it starts from a run of vtp-tiny.
        filled: whether captions are made to fill their context, as an estimate has them where data tells none.
    """

    stack: str
    mode: str = ""
    overrides: tuple[str, ...] = ()
    worlds: tuple[int, ...] = (1, 2)
    after: bool = False
    filled: bool = False

    def __str__(self) -> str:
        return f"{self.stack} {self.mode}".strip()


CASES = (
    Case("vtp-tiny"),
    Case("vtp-tiny", "blocks recomputed", ("train.activation_checkpointing=true",)),
    Case("vtp-tiny", "2 micro-batches", ("train.accumulate=2",)),
    Case("vtp-tiny", "bfloat16", ("train.precision=bfloat16",)),
    Case("vtp-tiny", "drop-path 0.2", ("encoder.drop_path=0.2",)),
    Case("vtp-tiny", "fsdp2", ("train.parallel=fsdp2",), worlds=(2,)),
    Case("vtp-tiny", "fsdp2, blocks recomputed", ("train.parallel=fsdp2", "train.activation_checkpointing=true"), (2,)),
    Case("vtp-tiny", "fsdp2, bfloat16", ("train.parallel=fsdp2", "train.precision=bfloat16"), (2,)),
    Case("vtp-tiny-gan", after=True),
    Case("lightningdit-tiny", after=True),
    Case("vtp-s", "cut down, captions of 77 tokens", tuple(SMALL), filled=True),
    Case("vtp-s", "cut down, captions of emoji", tuple(SMALL)),
)  # fmt: skip


def main() -> None:
    """Estimate and measure every case, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [c for c in CASES if not arguments.names or any(part in str(c) for part in arguments.names)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if any(case.after for case in chosen):
            train(load_stack("vtp-tiny", [*PLAIN, "train.steps=1", f"run.dir={run}"]))
        found = [row for case in chosen for row in compared(case, str(run), folder)]
    rows = merged(found)
    tables.save("memory", rows)
    tables.write_section("memory", section(rows), DOCS)


def merged(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and of cases that were not measured again the old ones; in the order of the cases."""
    path = Path(__file__).with_suffix(".jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for rows in ([json.loads(line) for line in lines], found):
        fresh = {(row["stack"], row["mode"]) for row in rows}
        by_case = {key: old for key, old in by_case.items() if key not in fresh}
        for row in rows:
            by_case.setdefault((row["stack"], row["mode"]), []).append(row)
    return [row for case in CASES for row in by_case.get((case.stack, case.mode), [])]


def stack_of(case: Case, run: str, *more: str) -> Stack:
    """The case's stack on the emoji images, if no more overrides say otherwise."""
    start = [f"tokenizer.from={run}"] if case.after else []
    return load_stack(case.stack, [*PLAIN, *start, *case.overrides, *more])


def compared(case: Case, run: str, folder: str) -> Iterator[dict[str, Any]]:
    """One row for each number of processes and kind."""
    silent = ["data.use=webdataset"] if case.filled else []  # tells no captions without its pictures
    for world in case.worlds:
        estimate = cost(stack_of(case, run, *silent), world)[0].memory
        results = Path(folder) / "measured.json"
        spawn(_process, (world, case, run, folder), nprocs=world)
        measured = [json.loads(line) for line in results.read_text().splitlines()]
        results.unlink()
        for kind in KINDS:
            found = max(row[kind] for row in measured)
            row = {"stack": case.stack, "mode": case.mode, "processes": world, "kind": kind}
            row |= {"estimated": getattr(estimate, kind), "measured": found}
            print(row, f"{error(row):+.1%}", flush=True)
            yield row


def _process(rank: int, world: int, case: Case, run: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{case}-{world}".replace(" ", "_")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    engine, inputs = engine_of(stack_of(case, run))
    if case.filled:
        fill(engine, inputs)
    memory = measure(engine, inputs)
    # Buffers that gloo's thread lets go late, when it gets no core, come on top of what a step needs.
    memory.peak = min(peak_bytes(lambda: engine.step(inputs)) for _ in range(STEPS))
    found: list[Any] = [None] * world
    dist.all_gather_object(found, {kind: getattr(memory, kind) for kind in KINDS})
    if rank == 0:
        Path(folder, "measured.json").write_text("".join(json.dumps(row) + "\n" for row in found))
    dist.barrier()
    os._exit(0)  # the profiler's and gloo's threads may fail while an interpreter closes


def engine_of(stack: Stack) -> tuple[Engine, Inputs]:
    """A stack's engine with its weights, and this process's first batch."""
    plans = blueprint(stack)
    dataset = dataset_factory(stack, spec_of(plans))(None)
    model = build(plans, *conditioning(stack, dataset, {}))
    if source := earlier(stack):
        adopt(model, source)
    engine = Engine(model, stack.train, stack.data.batch_size, provided=dataset.provides)
    batch = next(iter(loader_of(engine, stack, dataset, 0)))
    views = {name: value for name, value in batch.values.items() if name in model.views}
    return engine, Inputs(views, {name: value for name, value in batch.values.items() if name not in views})


def fill(engine: Engine, inputs: Inputs) -> None:
    """Make captions as long as they may be."""
    for name, view in engine.model.views.items():
        if view.field == "text" and name in inputs.views:
            inputs.views[name] = view(LONG).expand(inputs.views[name].shape).contiguous()


def error(row: dict[str, Any]) -> float:
    """By how much of the measured bytes an estimate is off."""
    measured: int = row["measured"]
    return row["estimated"] / measured - 1 if measured else float(row["estimated"] > 0)


def section(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines between the page's markers."""
    cases: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["stack"], row["mode"], row["processes"]), {})[row["kind"]] = row
    worst = max(rows, key=lambda row: abs(error(row)))
    where = f"{worst['stack']}, {worst['mode'] or 'as shipped'}, {worst['kind']}"
    head = (
        f"Bytes of a full step in MB, estimated / measured on {tables.machine()}; of two processes the larger is "
        f"shown. The largest error is {error(worst):+.1%} ({where})."
    )
    named = {
        "parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer state",
        "averages": "EMA", "saved": "kept by autograd", "peak": "all of a step",
    }  # fmt: skip
    lines = []
    for (stack, mode, world), kinds in cases.items():
        cells = [
            f"{r['estimated'] / 1e6:,.2f} / {r['measured'] / 1e6:,.2f} ({error(r):+.1%})"
            for r in kinds.values()
        ]
        lines.append([f"`{stack}`{', ' if mode else ''}{mode}", str(world), *cells])
    return [head, "", *tables.table(["stack", "processes", *(named[kind] for kind in KINDS)], lines)]


if __name__ == "__main__":
    main()
