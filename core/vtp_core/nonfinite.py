"""A step that is not finite: nothing of it stays, and people are told which objective, process and samples."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from vtp_core import distributed
from vtp_core.errors import Fault, NonFinite, StorageFault
from vtp_core.run import files, metrics
from vtp_core.tally import Tally, finite

if TYPE_CHECKING:
    from vtp_core.engine import Engine
    from vtp_core.inputs import Inputs
    from vtp_core.nodes import Plan

LARGEST = 5 * 2**20  # bytes of a dump
_NAMED = 256  # samples of a process that are named


@dataclass(slots=True)
class Found:
    """What one process has seen of a step.

    Attributes:
        terms: its own, by name, before the mean over processes.
        outputs: that an objective was handed and are not finite, ``slot.output`` by objective.
        gradient: whether an objective's own gradient was finite here, where that can be told.
        ids: indices of its samples, in row order.
        names: that the dataset gives those that the culprits read, in their order.
    """

    process: int
    host: str
    terms: dict[str, float]
    outputs: dict[str, list[str]] = field(default_factory=dict)
    gradient: dict[str, bool] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def stop(engine: Engine, row: Mapping[str, float], tally: Tally, step_plan: Plan, inputs: Inputs) -> NoReturn:
    """Undo what the step prepared, and name who is at fault; every process calls this.

    Args:
        engine: whose step it is.
        row: means over processes, of which some are not finite.
        tally: what this process noted itself.
        step_plan: of the step.
        inputs: of the step.
    """
    engine.optimizers.clear()
    engine.critics.undo()
    seen = _seen(engine, tally.own(), inputs)
    bad = [name for name, value in row.items() if not finite(value)]
    named = [n for n in bad if n != "loss" and not n.startswith(("grad/", "weight/"))]
    critics = [n.split("/")[1] for n in bad if n.startswith("grad/") and n.endswith("/critic")]
    culprits = _owners(named or critics)
    alone = [n for n in culprits or engine.active(engine.steps_done) if n in engine.active(engine.steps_done)]
    sick = [name for name in alone if not _repeated(engine, name, step_plan, inputs, seen)]
    if not culprits:
        culprits, named = sick, [f"{name} (gradient)" for name in sick]
    for objective in engine.model.objectives.values():
        objective.pending.clear()
    named = named or [f"{name} (gradient of its critic)" for name in critics] or bad
    where, page = _told(engine, seen, culprits, row)
    culprit = named[0].partition("/")[0].partition(" ")[0]
    raise NonFinite(
        f"step {engine.steps_done}: not finite: {', '.join(named)}{where}; no weight has moved. "
        f"Lower train.optim.lr or the weight of {culprit!r}, then resume from the last checkpoint{_kept(engine, page)}"
    )


@contextlib.contextmanager
def late(engine: Engine, inputs: Inputs) -> Iterator[None]:
    """A turn that comes when weights have moved: where it is not finite, that is told, and the step not saved."""
    try:
        yield
    except NonFinite as fault:
        seen = _seen(engine, {}, inputs)
        _, page = _told(engine, seen, [], {}, str(fault))
        raise NonFinite(
            f"{fault}; all other weights have, so this step is not saved: resume from the last checkpoint"
            f"{_kept(engine, page)}"
        ) from fault


def _seen(engine: Engine, terms: dict[str, float], inputs: Inputs) -> Found:
    ids = [] if inputs.ids is None else inputs.ids.tolist()
    return Found(engine.rank, socket.gethostname(), terms, ids=ids)


def _owners(named: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition("/")[0] for name in named))


def _repeated(engine: Engine, name: str, step_plan: Plan, inputs: Inputs, seen: Found) -> bool:
    """Whether the gradient of one objective alone is finite: draws are keyed, so the step can be repeated."""
    outputs: dict[str, None] = {}

    def look(_: Any, given: tuple[Any, ...]) -> None:
        for slot, handed in given[0].items():
            for output, value in handed.values.items():
                if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                    outputs[f"{slot}.{output}"] = None

    handle = engine.model.objectives[name].register_forward_pre_hook(look)
    # A balance of one: the true one would carry what is not finite to other objectives and processes.
    losses = replace(
        engine.losses(Tally(), only=name), gradient=lambda value, anchor: torch.ones_like(anchor)
    )
    try:
        engine.pull(step_plan, inputs, losses)
    finally:
        handle.remove()
    if outputs:
        seen.outputs[name] = list(outputs)
    if engine.train_keys.parallel == "replicated":  # else gradients are of all processes already
        seen.gradient[name] = _finite(engine.optimizers.norms())
    whole = _finite(engine.norms())
    engine.optimizers.clear()
    return whole


def _finite(norms: Mapping[str, Tensor]) -> bool:
    return all(finite(float(norm)) for norm in norms.values())


def _told(
    engine: Engine, seen: Found, culprits: Sequence[str], row: Mapping[str, float], what: str = ""
) -> tuple[str, dict[str, Any]]:
    """Which processes it was, in words, and everything about the step for the dump."""
    everyone: list[Found] = distributed.gathered(seen)
    guilty = {name: _guilty(name, everyone) for name in culprits}
    ranks = sorted({rank for found in guilty.values() for rank in found})
    rows = {name: engine.layout.rows[name] * engine.train_keys.accumulate for name in culprits}
    if engine.rank in ranks:
        most = max(rows[name] for name in culprits)
        seen.names = _names(engine, seen.ids[: min(most, _NAMED)])
    everyone = distributed.gathered(seen)
    page = {
        "step": engine.steps_done, "what": what, "seed": engine.train_keys.seed,
        "objectives": {name: {"processes": guilty[name], "rows": rows[name]} for name in culprits},
        "means": dict(row),
        "processes": [asdict(found) for found in everyone],
    }  # fmt: skip
    several = "processes" if len(ranks) > 1 else "process"
    where = (
        f" in {several} {', '.join(map(str, ranks))} of {engine.world}" if ranks and engine.world > 1 else ""
    )
    return where, page


def _guilty(name: str, everyone: Sequence[Found]) -> list[int]:
    """The fewest processes that any sign points to; what rows are coupled by spreads to all."""
    signs = (
        [found.process for found in everyone if found.outputs.get(name)],
        [found.process for found in everyone if not found.gradient.get(name, True)],
        [
            found.process
            for found in everyone
            if any(not finite(v) for n, v in found.terms.items() if n.startswith(f"{name}/"))
        ],
    )
    return min((ranks for ranks in signs if ranks), key=len, default=[])


def _names(engine: Engine, ids: Sequence[int]) -> list[str]:
    names = []
    with contextlib.suppress(ValueError, OSError, Fault):  # a sample that can no longer be read has no name
        for index in ids:
            names.append(engine.sample_name(index))
    return [name[:200] for name in names if name is not None]


def _kept(engine: Engine, page: dict[str, Any]) -> str:
    """Write the dump; returns what to say of it, on every process the same."""
    if engine.run_path is None:
        return ""
    path = engine.run_path / f"nonfinite-step-{engine.steps_done:08d}.json"
    said = f"; {path.name} in the run's directory tells more"
    if engine.rank == 0:
        try:
            files.replace(path, _encoded(page))
        except StorageFault as fault:
            said = f" ({str(fault).splitlines()[0]})"
    return distributed.told(said if engine.rank == 0 else None)


def _encoded(page: dict[str, Any]) -> bytes:
    """The page as strict JSON, without what it is too large for."""
    for lean in ((), ("names",), ("names", "ids")):
        kept = [{k: v for k, v in found.items() if k not in lean} for found in page["processes"]]
        whole = json.loads(metrics.encode({**page, "processes": kept}))
        data = (json.dumps(whole, ensure_ascii=False, indent=1) + "\n").encode()
        if len(data) <= LARGEST:
            break
    return data
