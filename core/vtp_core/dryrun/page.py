"""What ``vtp train --dry-run`` adds to the plan: memory by kind, communication, checkpoint, shards."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vtp_core.costs import Costs
from vtp_core.dryrun.data import Dealt
from vtp_core.dryrun.memory import Memory
from vtp_core.dryrun.writing import GRACE, RATE, Checkpoint
from vtp_core.layout import Layout

KINDS = {
    "parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer state",
    "averages": "EMA teacher and averages", "frozen": "frozen networks", "inputs": "batch",
    "fetched": "sharded weights, largest part fetched", "waiting": "whole gradients between stages",
    "gathered": "gathered by coupled losses", "saved": "kept by autograd, largest stage",
    "together": "most at one time",
}  # fmt: skip
CAUSES = {
    "gradients": "gradients, averaged in flat buckets", "shards": "weights and gradients of shards",
    "losses": "coupled losses", "balance": "balanced weights", "control": "flags and numbers of the step",
}  # fmt: skip


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in {"B", "kB"} else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def memory_table(memory: Memory, costs: Costs) -> Table:
    """Bytes of one process by kind."""
    table = Table("memory of a process", "", "", box=None, padding=(0, 2, 0, 0))
    for kind, words in KINDS.items():
        if count := getattr(memory, kind):
            table.add_row(words, size(count), _remark(kind, memory, costs))
    return table


def _remark(kind: str, memory: Memory, costs: Costs) -> str:
    if kind == "together":
        return f"{size(memory.peak)} of it the step's own, with what operators need in passing"
    if kind != "saved":
        return ""
    sizes = costs.stage_bytes()
    if memory.rest >= max(sizes, default=0):
        return "critics on fresh input"
    index = sizes.index(max(sizes))
    return f"stage {index + 1}: {', '.join(costs.plan.stages[index].readers)}"


def traffic_table(costs: Costs) -> Table:
    """Bytes of a step by what they are for."""
    table = Table(
        "communication of a step", "calls", "each sends and receives", box=None, padding=(0, 2, 0, 0)
    )
    for row in traffic(costs):
        whose = f" of {row['objective']}" if row["objective"] else ""
        table.add_row(f"{row['call']}: {CAUSES[row['cause']]}{whose}", str(row["calls"]), size(row["bytes"]))
    return table


def traffic(costs: Costs) -> list[dict[str, Any]]:
    """Calls and bytes by cause, kind of collective and objective."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for c in costs.collectives:
        entry = found.setdefault((c.cause, c.kind, c.owner), [0, 0.0])
        entry[0] += 1
        entry[1] += c.sent(costs.world)
    order = list(CAUSES)
    return [
        {"cause": cause, "call": kind.replace("_", "-"), "objective": owner, "calls": int(calls), "bytes": round(count)}
        for (cause, kind, owner), (calls, count) in sorted(found.items(), key=lambda e: order.index(e[0][0]))
    ]  # fmt: skip


def checkpoint_lines(checkpoint: Checkpoint) -> list[str]:
    """Files, sizes, time to write."""
    files = ", ".join(f"{part} {size(count)}" for part, count in checkpoint.parts.items())
    each = f" in each of {checkpoint.processes} processes" if checkpoint.processes > 1 else ""
    lines = [f"checkpoint     {size(checkpoint.whole)}; {len(checkpoint.parts)} files{each}: {files}"]
    within = "within" if not checkpoint.advice else "longer than"
    lines.append(
        f"saving         about {checkpoint.seconds:.0f} s if {RATE / 1e6:.0f} MB/s are written and hashed, "
        f"{within} the {GRACE:.0f} s that torchrun waits after SIGTERM"
        + (f": {checkpoint.advice}" if checkpoint.advice else "")
    )
    return lines


def data_lines(found: Dealt, layout: Layout) -> list[str]:
    """Which shards the processes read."""
    everyone = "samples are dealt by position: every process opens every shard it needs"
    if found.unknown:
        return [f"data           {everyone} ({found.unknown})"]
    steps = found.samples / layout.batch_size
    least = f": fewer than one batch of {layout.batch_size:,}, which holds samples twice" if steps < 1 else ""
    return [
        f"data           {len(found.shards):,} shards, {found.samples:,} samples, {steps:,.1f} steps an epoch{least}",
        f"shards         {everyone}, {min(found.window, len(found.shards))} at a time, and reads 1 of "
        f"{layout.world} samples of each",
    ]


def as_json(costs: Costs, checkpoint: Checkpoint, found: Dealt) -> dict[str, Any]:
    """The same as plain data."""
    memory = costs.memory
    return {
        "memory": {kind: getattr(memory, kind) for kind in (*KINDS, "peak")},
        "communication": traffic(costs),
        "checkpoint": {
            "bytes": checkpoint.whole, "files": dict(checkpoint.parts), "processes": checkpoint.processes,
            "seconds": checkpoint.seconds, "bytes_a_second": RATE, "grace_seconds": GRACE, "advice": checkpoint.advice,
        },
        "data": {
            "shards": len(found.shards), "samples": found.samples, "unknown": found.unknown,
            "window": min(found.window, len(found.shards)),
        },
    }  # fmt: skip
