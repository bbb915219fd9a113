"""Gradients of 1, 2 and 4 processes, with recomputed blocks and micro-batches, against one process's whole batch.

    python -m benchmarks.distributed [--worlds 1 2 4] [NAME ...]

NAME picks cases by a part of their name. In float64 two steps are taken, so that centres, critics and teachers have
moved. The error of a case is the largest of ||g - g1|| / ||g1|| over the owners of parameters (encoder, decoder, each
objective, each critic), and over the loss terms. Writes ``distributed.jsonl`` beside this file and the section
``gradients`` of ``docs/distributed.md``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks import tables
from benchmarks.distributed_cases import BASE, BATCH, FULL, Case, Uneven, cases, vtp
from benchmarks.measuring import WORDS
from vtp_core.build import blueprint, build
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_core.stack import check_stack
from vtp_plugins.errors import StackFault
from vtp_plugins.registry import Registry

TOLERANCES = {"float64": 1e-10, "float32": 2e-5}
STEPS = {"float64": 2, "float32": 1}  # after a step in float32, weights differ by rounding already
DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
Setting = tuple[str, str, bool, int]
"""Case, precision, whether blocks are recomputed, micro-batches."""
Found = dict[str, Any]


def main() -> None:
    """Run the grid, write the numbers, rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    names = [n for n in cases() if not arguments.names or any(part in n for part in arguments.names)]
    grid = list(settings(names))
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.worlds:
            spawn(_process, (world, folder, grid), nprocs=world)
        loaded = {world: torch.load(Path(folder) / f"{world}.pt") for world in arguments.worlds}
    rows = list(compared({world: found for world, (found, _) in loaded.items()}, grid))
    shares = {world: shares for world, (_, shares) in loaded.items()}
    for row in rows:
        print(row)
    if not arguments.names:
        spreads = [{"contribution": name, **row} for name, row in spread(shares).items()]
        tables.save("distributed", [*rows, *spreads])
        tables.write_section("gradients", [*section(rows), *shares_section(shares)], DOCS)


def settings(names: Sequence[str]) -> Iterator[Setting]:
    """What each case is measured with; the first setting of a precision is what all are compared with."""
    for name, precision in itertools.product(names, TOLERANCES):
        for recompute, accumulate in ((False, 1), (True, 1), (False, 2), (True, 4)):
            yield name, precision, recompute, accumulate


def _process(rank: int, world: int, folder: str, grid: Sequence[Setting]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = [measured(*setting) for setting in grid]
    shares = contributions()
    if rank == 0:
        torch.save((found, shares), Path(folder) / f"{world}.pt")
    dist.destroy_process_group()


# ---- one setting


def measured(name: str, precision: str, recompute: bool = False, accumulate: int = 1) -> Found:
    """Gradients by step and owner and loss terms by step, as the optimizers see them on this process.

    Where the stack is refused, the message alone.
    """
    train = {"precision": precision, "activation_checkpointing": recompute, "accumulate": accumulate}
    try:
        engine = engine_of(cases()[name], **train)
    except StackFault as fault:
        return {"refused": str(fault)}
    grads: dict[str, Tensor] = {}
    watch(engine, grads)
    terms: dict[str, float] = {}
    for step in range(STEPS[precision]):
        row = engine.step(batch_of(engine, step))
        terms |= {f"{step}/{k}": v for k, v in row.items() if not k.startswith(("lr/", "grad/"))}
    return {"gradients": grads, "terms": terms}


def engine_of(case: Case, **train: Any) -> Engine:
    """The engine of a case, for as many processes as there are."""
    sections = {**BASE, **case.sections, "train": {**BASE["train"], **train}}
    stack = check_stack(case.name, sections, Registry())
    model = build(blueprint(stack), classes=3)
    _move(model.modules())
    engine = Engine(model, stack.train, case.batch)
    if case.uneven:
        engine.layout.samplers["block"] = Uneven()
    return engine


@torch.no_grad()
def _move(modules: Mapping[str, nn.Module]) -> None:
    """Shift every weight a little: a head, a token or a modulation that starts at zero has gradients of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for module in modules.values() for p in module.parameters() if p.requires_grad):
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def batch_of(engine: Engine, seed: int) -> Inputs:
    """This process's rows of a global batch of noise, words and labels."""
    torch.manual_seed(seed)
    draw, spec, own = random.Random(seed), engine.model.spec, slice(engine.rank, None, engine.world)
    views, fields = {}, {}
    for name, rows in sorted(engine.layout.rows_by_view().items()):
        count, view = rows * engine.world, engine.model.views.get(name)
        if view is None:
            fields[name] = torch.randint(spec.classes, (count,))[own]
        elif view.field == "text":
            captions = [" ".join(draw.choices(WORDS.split(), k=draw.randint(2, 7))) for _ in range(count)]
            views[name] = torch.stack([view(caption) for caption in captions])[own]  # (W R, L) -> (R, L)
        else:
            shape = view(torch.zeros(spec.signal_channels, *spec.size, dtype=torch.uint8)).shape
            views[name] = torch.randint(256, (count, *shape), dtype=torch.uint8)[own]
    return Inputs(views, fields)


def watch(engine: Engine, found: dict[str, Tensor]) -> None:
    """Copy every owner's gradient into ``found`` as its optimizer is about to step."""

    def watched(prefix: str, optimizer: torch.optim.Optimizer) -> None:
        def catch(*_: Any) -> None:
            for group in optimizer.param_groups:
                key = f"{engine.steps_done}/{prefix}{group['owner']}"
                parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group["params"]]
                flat = torch.cat([part.flatten() for part in parts])
                found[key] = torch.cat([found.get(key, flat[:0]), flat])

        optimizer.register_step_pre_hook(catch)

    for optimizer in engine.optimizers.optimizers.values():
        watched("", optimizer)
    for name, optimizers in engine.critics.optimizers.items():
        for optimizer in optimizers.optimizers.values():
            watched(f"{name}/", optimizer)


def contributions() -> dict[str, float]:
    """Norm of the gradient that each of VTP's objectives has with its weight, while the others weigh nothing."""
    found = {}
    for name in FULL:
        objectives = {n: {**keys, "weight": keys["weight"] * (n == name)} for n, keys in FULL.items()}
        engine = engine_of(Case(name, vtp(objectives), uneven=True, batch=2 * BATCH), precision="float32")
        row = engine.step(batch_of(engine, 0))
        found[name] = math.hypot(*(value for key, value in row.items() if key.startswith("grad/")))
    return found


# ---- comparing


def error(found: Found, alone: Found) -> float:
    """The largest relative error of an owner's gradient or of a loss term."""
    assert found["gradients"].keys() == alone["gradients"].keys(), (
        found["gradients"].keys() ^ alone["gradients"].keys()
    )
    worst = 0.0
    for key, own in alone["gradients"].items():
        off = torch.linalg.vector_norm(found["gradients"][key] - own)
        worst = max(worst, float(off / torch.linalg.vector_norm(own).clamp(min=1e-30)))
    for key, value in alone["terms"].items():
        worst = max(worst, abs(found["terms"][key] - value) / max(abs(value), 1e-2))
    return worst


def compared(found: Mapping[int, Sequence[Found]], grid: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """A row for every setting on every number of processes."""
    first = dict(zip(grid, found[1], strict=True))
    for world, ours in found.items():
        for (name, precision, recompute, accumulate), own in zip(grid, ours, strict=True):
            row = {
                "case": name, "world": world, "precision": precision, "recompute": recompute,
                "accumulate": accumulate, "tolerance": TOLERANCES[precision],
            }  # fmt: skip
            if "refused" in own:
                yield {**row, "refused": own["refused"]}
            else:
                yield {**row, "error": error(own, first[name, precision, False, 1])}


COLUMNS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "2 processes": lambda row: _is(row, "float64", 2, False, 1),
    "4 processes": lambda row: _is(row, "float64", 4, False, 1),
    "blocks recomputed": lambda row: _is(row, "float64", None, True, 1),
    "2 and 4 micro-batches": lambda row: row["precision"] == "float64" and row["accumulate"] > 1,
    "float32, all of it": lambda row: row["precision"] == "float32",
}


def _is(row: Mapping[str, Any], precision: str, world: int | None, recompute: bool, accumulate: int) -> bool:
    same = (row["precision"], row["recompute"], row["accumulate"]) == (precision, recompute, accumulate)
    return same and world in (None, row["world"])


def section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table: the worst errors of each case."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        cells = [f"`{name}`"]
        for chosen in COLUMNS.values():
            found = [row for row in rows if row["case"] == name and chosen(row)]
            errors = [row["error"] for row in found if "error" in row]
            cells.append(f"{max(errors):.0e}" if errors else "refused" if found else "")
        lines.append(cells)
    return [
        "",
        f"Relative errors in float64, the larger of two steps', and in float32; tolerances {TOLERANCES['float64']:g} "
        f"and {TOLERANCES['float32']:g}. Batches of {BATCH} and {2 * BATCH} on {tables.machine()}.",
        "",
        *tables.table(["stack", *COLUMNS], lines),
        "",
    ]


def spread(shares: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """An objective's contribution by number of processes, and (largest - smallest) / mean."""
    found = {}
    for name in shares[1]:
        norms = [own[name] for own in shares.values()]
        found[name] = {f"{world}": own[name] for world, own in shares.items()}
        found[name]["spread"] = (max(norms) - min(norms)) / statistics.mean(norms)
    return found


def shares_section(shares: Mapping[int, Mapping[str, float]]) -> list[str]:
    """The table of contributions."""
    head = ["objective of `vtp`", *(f"{world} process{'es' * (world > 1)}" for world in shares), "spread"]
    rows = [
        [f"`{name}`", *(f"{own[f'{world}']:.6f}" for world in shares), f"{own['spread']:.0e}"]
        for name, own in spread(shares).items()
    ]
    return [
        "Norms of the gradients that objectives contribute, in float32:",
        "",
        *tables.table(head, rows),
        "",
    ]


if __name__ == "__main__":
    main()
