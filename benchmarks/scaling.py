"""Weak scaling measured on two processes here, and weak and strong scaling simulated for up to 512 GPUs.

    python -m benchmarks.scaling [--rounds 12] [--rows 32] [--only measured | simulated]

Measured: images a second of ``vtp-tiny`` with one process, with two that know nothing of each other, and with two that
train together over gloo; one thread each, taking turns, so that what else the machine does meets all of them.
Simulated: FLOPs and bytes of the plan of ``vtp-b`` and ``vtp-l``, replicated and sharded, on the cluster that
``cluster.py`` describes. Writes ``scaling.jsonl`` beside this file, the section ``scaling`` of ``docs/distributed.md``
and ``docs/scaling.png``. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measuring as ask
from benchmarks import tables
from benchmarks.cluster import Cluster, step_of
from benchmarks.scaling_page import draw, section
from vtp_core import load_stack
from vtp_core.costs import cost

DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
WAYS = {"alone": 1, "apart": 2, "together": 2}
"""Way -> processes that work at once."""
STACKS = ("vtp-b", "vtp-l")
PARALLEL = ("replicated", "fsdp2")
WORLDS = (1, 8, 64, 512)
ROWS, BATCH = 32, 16384  # of each GPU where batches grow with their number; of all where they do not
MODE = ["train.activation_checkpointing=true"]
STEPS = 2  # of a turn
Row = dict[str, Any]


def main() -> None:
    """Measure, simulate, write the numbers, the section and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--only", choices=["measured", "simulated"])
    arguments = parser.parse_args()
    path = Path(__file__).with_suffix(".jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    measured = [row for row in rows if row["kind"] == "measured"]
    simulated = [row for row in rows if row["kind"] == "simulated"]
    if arguments.only != "simulated":
        measured = [measure(arguments.rounds, arguments.rows)]
        print(measured[0])
    if arguments.only != "measured":
        simulated = simulate()
    tables.save("scaling", [*measured, *simulated])
    if measured and simulated:
        tables.write_section("scaling", section(measured[0], simulated), DOCS)
        draw(simulated, DOCS.with_name("scaling.png"))


# ---- measured


def measure(rounds: int, rows: int) -> Row:
    """Medians over rounds in which all ways take turns."""
    context, pipes, workers, load = get_context("spawn"), [], [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for rank, joined in ((0, False), (1, False), (0, True), (1, True)):
            ours, theirs = context.Pipe()
            workers.append(context.Process(target=_worker, args=(theirs, folder, rank, joined, rows)))
            workers[-1].start()
            theirs.close()  # or a worker's death would not end the pipe
            pipes.append(ours)
        groups = {"alone": pipes[:1], "apart": pipes[:2], "together": pipes[2:]}
        for way in ("apart", "together"):  # batches are made, caches are warm
            _turn(groups[way])
        found = [{way: _turn(groups[way]) for way in WAYS} for _ in range(rounds)]
        for pipe, worker in zip(pipes, workers, strict=True):
            pipe.send(False)
            worker.join()
    seconds = {way: statistics.median(row[way] for row in found) for way in WAYS}
    return {
        "kind": "measured", "stack": "vtp-tiny", "rows": rows, "rounds": rounds, "machine": tables.machine(),
        "load": load,
        "images_per_second": {way: STEPS * rows * WAYS[way] / seconds[way] for way in WAYS},
        "efficiency": statistics.median(row["alone"] / row["together"] for row in found),
        "shared_memory": statistics.median(row["alone"] / row["apart"] for row in found),
        "communication": statistics.median(row["apart"] / row["together"] for row in found),
    }  # fmt: skip


def _turn(pipes: Sequence[Any]) -> float:
    """Seconds until all of these processes have taken their steps."""
    for pipe in pipes:
        pipe.recv()  # it is ready
    began = time.perf_counter()
    for pipe in pipes:
        pipe.send(True)
    for pipe in pipes:
        pipe.recv()
    return time.perf_counter() - began


def _worker(pipe: Any, folder: str, rank: int, joined: bool, rows: int) -> None:
    torch.set_num_threads(1)
    if joined:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine = ask.engine_of(
        "vtp-tiny", [*ask.PLAIN, f"data.batch_size={rows * (1 + joined)}", "objectives.dino.start=0"]
    )
    inputs = ask.batch_of(engine, rank)
    engine.step(inputs)
    pipe.send(None)
    while pipe.recv():
        for _ in range(STEPS):
            engine.step(inputs)
        pipe.send(None)
        pipe.send(None)


# ---- simulated


def simulate() -> list[Row]:
    """Every stack, way of training and number of GPUs, once with batches that grow and once with the stack's own."""
    wanted = []
    for stack in STACKS:
        for parallel in PARALLEL:
            wanted += [("weak", stack, parallel, world, ROWS * world) for world in WORLDS]
            wanted += [("strong", stack, parallel, world, BATCH) for world in WORLDS[1:]]
    jobs = list(dict.fromkeys(_job(*row[1:]) for row in wanted))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = dict(zip(jobs, pool.map(_simulated, jobs), strict=True))
    return [
        {"kind": "simulated", "scaling": scaling, **found[_job(stack, parallel, *rest)], "parallel": parallel}
        for scaling, stack, parallel, *rest in wanted
    ]


def _job(stack: str, parallel: str, world: int, batch: int) -> tuple[str, str, int, int]:
    """What is planned; one process deals its weights to nobody."""
    return stack, parallel if world > 1 else "replicated", world, batch


def _simulated(job: tuple[str, str, int, int]) -> Row:
    stack, parallel, world, batch = job
    torch.set_num_threads(1)
    overrides = [f"data.batch_size={batch}", f"train.parallel={parallel}", *MODE]
    costs = cost(load_stack(stack, overrides), world, shared=False)[0]
    step = step_of(costs, Cluster())
    row = {"stack": stack, "parallel": parallel, "gpus": world, "batch": batch, "rows": batch // world}
    row |= {"flops": costs.step_flops, "bytes": costs.memory.together, "sent": round(costs.sent_bytes())}
    row |= {**asdict(step), "seconds": step.seconds}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
