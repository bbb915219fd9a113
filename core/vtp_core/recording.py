"""What a run writes beside its numbers: plan and names before the first step, skipped samples after the last."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from pathlib import Path

from vtp_core import distributed
from vtp_core.data.loader import Loader
from vtp_core.describe import plan
from vtp_core.errors import StorageFault
from vtp_core.run.directory import RunDirectory
from vtp_core.run.names import encode_names
from vtp_core.stack import Stack
from vtp_plugins.protocols import Dataset


def create(
    stack: Stack, dataset: Dataset, world: int, place: Path | None, claimed: Callable[[Path], object]
) -> RunDirectory:
    """Make the directory of a run that begins, with its plan and the names behind its data's labels.

    Args:
        stack: to train.
        dataset: to train on.
        world: number of processes.
        place: directory that an earlier attempt claimed, None where there was none.
        claimed: told of the directory before anything is in it.
    """
    path = place or (Path(stack.run.dir) if stack.run.dir else None)
    data, job = dataset.fingerprint(), distributed.job()
    directory = RunDirectory.create(
        path, stack.config, stack.name, seed=stack.train.seed, data=data, job=job, claimed=claimed
    )
    complete(directory, stack, dataset, world)
    return directory


def complete(directory: RunDirectory, stack: Stack, dataset: Dataset, world: int) -> None:
    """Write plan and names, which a run lacks whose first process died while making it."""
    if (directory.path / "names.json").is_file():
        return
    page = plan(stack, world, dataset)
    directory.write("plan.txt", str(page))
    directory.write("plan.json", json.dumps(page.data, indent=1))
    directory.write("names.json", encode_names(dataset.names))


def note_running(directory: RunDirectory, resumed_at: int | None) -> None:
    """Record that a run begins or goes on, each time it does: ``resumed`` of ``run.json``.

    Args:
        directory: of the run.
        resumed_at: the step that it goes on from; None for one that begins.
    """
    if resumed_at is None:
        directory.mark("running")
        return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = {"step": resumed_at, "at": now, "processes": distributed.world_size()}
    if distributed.restarts():
        entry["restart"] = distributed.restarts()  # of all processes
    earlier = directory.record().get("resumed", [])
    directory.mark("running", fault=None, resumed=[*earlier, entry])


def keep_skipped(directory: RunDirectory, loader: Loader, rank: int, world: int) -> str:
    """Keep the list of samples that this process passed over; returns what to say of them, empty for none."""
    if not loader.bad:
        return ""
    reasons = ", ".join(f"{reason}: {count}" for reason, count in loader.bad.items())
    counts = f"{loader.bad.total()} of {loader.read} samples read ({reasons})"
    name = f"skipped.{rank}.tsv" if rank else "skipped.tsv"
    with contextlib.suppress(StorageFault):  # the run ends anyway, for a reason that matters more
        directory.add(name, [f"{n}\t{why}" for n, why in loader.quarantine.items()])
    whose = f"process {rank}: " if world > 1 else ""
    return f"{whose}data: skipped {counts}; named in {name}"
