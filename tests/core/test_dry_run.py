"""A dry run says what a run holds, sends and writes, without data, from tensors without values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from pool import Pool
from rig import batch_of, engine_of, stack_of
from small import STACK, write_stack
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from two import OBJECTIVES, SECTIONS

from benchmarks import memory
from benchmarks.measuring import peak_bytes
from vtp_core.costs import Costs, cost
from vtp_core.describe import PlanPage
from vtp_core.dryrun.measuring import measure
from vtp_core.dryrun.notes import Notes
from vtp_core.forwards import Inputs
from vtp_core.run import checkpoint
from vtp_core.stack import Stack, load_stack
from vtp_plugins.registry import Registry

KINDS = ("parameters", "gradients", "optimizer", "averages", "saved")
MODES: dict[str, list[str]] = {
    "micro-batches, drop-path": ["train.accumulate=2", "encoder.drop_path=0.3"],
    "bfloat16, recomputed": ["train.precision=bfloat16", "train.activation_checkpointing=true"],
}

VALUES = """
from vtp_core.data.views import Plain
from vtp_core.models.vit import ViT
from vtp_plugins import Need, Objective


class Looks(Objective):
    def __init__(self, spec):
        super().__init__()
        self.views, self.needs = {"image": Plain(spec)}, {"x": Need("image", "cls", mask=None)}

    def forward(self, got, clock):
        x = got["x"]["cls"]
        return {"size": x.mean() if x.mean() > 0 else -x.mean()}


class Picks(Looks):
    def forward(self, got, clock):
        x = got["x"]["cls"]
        return {"large": x[x > 0].square().mean()}


class Careful(ViT):
    def forward(self, x, **keys):
        assert x.isfinite().all()
        return super().forward(x, **keys)


PLUGINS = {"objectives": {"looks": Looks, "picks": Picks}, "encoders": {"careful": Careful}}
"""


class Labels:
    """Data that says what its labels are called, and no more."""

    names = {"label": ("a", "b", "c")}
    fields = frozenset({"image", "label"})
    provides: frozenset[str] = frozenset()

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("a dry run reads no sample")


def held(path: str, overrides: list[str]) -> dict[str, int]:
    """Bytes by kind of a real step in this process."""
    torch.set_num_threads(1)
    found = measure(*memory.engine_of(load_stack(path, overrides)))
    return {kind: getattr(found, kind) for kind in KINDS}


class Listening(TorchDispatchMode):
    """Notes the collectives of real steps, and beside it the largest of what goes in and what comes out of each."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = Notes()
        self.largest: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if func.namespace in {"c10d", "_c10d_functional"}:
            before = len(self.notes.collectives)
            self.notes.sent(func.name(), args)
            sizes = [sum(t.nbytes for t in tree_iter(x) if isinstance(t, Tensor)) for x in (*args, out)]
            self.largest += [max(sizes)] * (len(self.notes.collectives) - before)
        return out


def held_and_sent(path: str, overrides: list[str]) -> tuple[dict[str, int], Counter[tuple[str, str, int]]]:
    """Bytes by kind of a real step, and the collectives of another."""
    torch.set_num_threads(1)
    engine, inputs = memory.engine_of(load_stack(path, overrides))
    found = measure(engine, inputs)
    with Listening() as heard:
        engine.step(inputs)
    sent = zip(heard.notes.collectives, heard.largest, strict=True)
    return {k: getattr(found, k) for k in KINDS}, Counter((c.kind, c.cause, size) for c, size in sent)


def off(estimated: Any, measured: dict[str, int]) -> dict[str, float]:
    return {kind: abs(getattr(estimated, kind) / measured[kind] - 1) for kind in KINDS}


def planned(folder: Path, *overrides: str, world: int = 1, text: str = STACK) -> Costs:
    return cost(load_stack(str(write_stack(folder, text)), overrides), world)[0]


# ---- memory


@pytest.mark.parametrize("mode", MODES)
def test_the_estimate_is_near_what_a_step_holds(tmp_path: Path, mode: str) -> None:
    estimated = planned(tmp_path, *MODES[mode]).memory
    errors = off(estimated, held(str(tmp_path / "small.yaml"), MODES[mode]))
    assert max(errors.values()) <= 0.15, errors


@pytest.mark.parametrize("parallel", ["replicated", "fsdp2"])
def test_so_is_that_of_two_processes_and_what_they_send(tmp_path: Path, two: Pool, parallel: str) -> None:
    overrides = [f"train.parallel={parallel}"]
    estimated = planned(tmp_path, *overrides, world=2)
    for found, sent in two(held_and_sent, str(tmp_path / "small.yaml"), overrides):
        errors = off(estimated.memory, found)
        assert max(errors.values()) <= 0.15, errors
        assert Counter((c.kind, c.cause, c.size) for c in estimated.collectives) == sent
    assert (estimated.memory.fetched > 0) == (parallel == "fsdp2") == bool(estimated.sharded)


def test_every_pattern_of_the_family_is_counted_to_the_byte() -> None:
    data = {"use": "emoji", "batch_size": 16}
    estimated, _ = cost(stack_of(OBJECTIVES, data=data, **SECTIONS), 1, Labels())  # type: ignore[arg-type]
    engine = engine_of(OBJECTIVES, batch=16, **SECTIONS)
    batch = batch_of(engine)
    views = {
        name: view.float() for name, view in batch.views.items()
    }  # converted in the step, as a loader's are
    measured = measure(engine, Inputs(views, batch.fields))
    assert not estimated.left_out
    for kind in KINDS:
        assert getattr(estimated.memory, kind) == getattr(measured, kind), kind
    allocated = peak_bytes(lambda: engine.step(Inputs(views, batch.fields)))
    assert estimated.memory.peak == pytest.approx(allocated, rel=0.15)


@pytest.mark.slow
def test_the_table_of_the_docs_stays_within_15_percent(tmp_path: Path) -> None:
    source = str(tmp_path / "run")
    memory.train(load_stack("vtp-tiny", [*memory.PLAIN, "train.steps=1", f"run.dir={source}"]))
    for case in memory.CASES:
        for row in memory.compared(case, source, str(tmp_path)):
            assert abs(memory.error(row)) <= 0.15, row


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicated", "fsdp2"])
@pytest.mark.parametrize("stack", ["vtp-tiny", "vtp-tiny-gan", "lightningdit-tiny"])
def test_shipped_stacks_send_what_is_planned(tmp_path: Path, two: Pool, stack: str, parallel: str) -> None:
    overrides = [*memory.PLAIN, "data.batch_size=16", f"train.parallel={parallel}"]
    if stack != "vtp-tiny":
        run = tmp_path / "run"
        memory.train(
            load_stack("vtp-tiny", [*memory.PLAIN, "data.batch_size=16", "train.steps=1", f"run.dir={run}"])
        )
        overrides.append(f"tokenizer.from={run}")
    planned = cost(load_stack(stack, overrides), 2, shared=False)[0]
    expected = Counter((c.kind, c.cause, c.size) for c in planned.collectives)
    for _, sent in two(held_and_sent, stack, overrides):
        assert sent == expected


def test_the_whole_of_every_collective_is_counted(two: Pool) -> None:
    for counted in two(every_collective):
        assert counted == [
            ("all_reduce", 24), ("all_gather", 48), ("all_gather", 48), ("reduce_scatter", 24), ("all_to_all", 24),
            ("all_reduce", 24), ("all_gather", 48), ("reduce_scatter", 24), ("all_to_all", 24),
        ]  # fmt: skip


def every_collective() -> list[tuple[str, int]]:
    """Six float32 of each process through what torch has, in place and functional."""
    x, wide, half, everyone = torch.ones(6), torch.empty(12), torch.empty(3), dist.group.WORLD
    with Listening() as heard:
        dist.all_reduce(x)
        dist.all_gather([torch.empty(6), torch.empty(6)], x)
        dist.all_gather_into_tensor(wide, x)
        dist.reduce_scatter_tensor(half, x)
        dist.all_to_all_single(torch.empty(6), x)
        dist.barrier()
        funcol.wait_tensor(funcol.all_reduce(x, "sum", everyone))
        funcol.wait_tensor(funcol.all_gather_tensor(x, 0, everyone))
        funcol.wait_tensor(funcol.reduce_scatter_tensor(x, "sum", 0, everyone))
        funcol.wait_tensor(funcol.all_to_all_single(x, None, None, everyone))
        with pytest.raises(NotImplementedError, match="does not count c10d::reduce_;"):
            dist.reduce(x, 0)
    counted = [(c.kind, c.size) for c in heard.notes.collectives]
    assert heard.largest == [size for _, size in counted]
    return counted


# ---- captions


def test_captions_are_as_long_as_those_of_the_data(tmp_path: Path) -> None:
    path = write_stack(tmp_path)
    told, silent = (
        cost(load_stack(str(path), [f"data.use={use}"]), shared=False)[0] for use in ("emoji", "webdataset")
    )
    ((ids, context),) = told.captions.values()
    assert told.texts == 16 and ids < context
    assert silent.texts == 0 and silent.captions == {"tokens": (context, context)}
    assert told.memory.saved < silent.memory.saved


# ---- what depends on values


def test_masks_have_their_true_number_of_places(tmp_path: Path) -> None:
    alone = [f"objectives.{name}=null" for name in ("clip", "dino", "koleo", "reconstruction")] + [
        "decoder=null"
    ]
    every = planned(
        tmp_path, *alone, "objectives.ibot.mask_probability=1.0", "objectives.ibot.mask_ratio=[0.9,0.95]"
    )
    few = planned(
        tmp_path, *alone, "objectives.ibot.mask_probability=0.25", "objectives.ibot.mask_ratio=[0.2,0.25]"
    )
    assert every.objectives["ibot"][0] > 5 * few.objectives["ibot"][0]
    assert not every.left_out and not every.bounded


def test_an_objective_that_looks_at_values_is_left_out_by_name(tmp_path: Path) -> None:
    looking = "objectives:\n  looks: {}\n  picks: {}\n  hardest: {use: looks}"
    stack = valued(tmp_path, STACK.replace("objectives:", looking))
    found, layout = cost(stack)
    assert list(found.left_out) == ["looks", "hardest"]
    assert "asks for a value" in found.left_out["looks"]
    assert found.bounded == ["picks"]
    assert {name for name, _ in found.plan.handouts} == {
        "picks",
        "clip",
        "dino",
        "ibot",
        "koleo",
        "reconstruction",
    }
    page = str(PlanPage(stack, found, layout))
    assert "left out       looks: " in page and "upper bound    picks: " in page


def test_where_a_module_looks_at_values_nothing_is_counted_and_a_run_goes_on(tmp_path: Path) -> None:
    stack = valued(tmp_path, STACK.replace("use: vit,", "use: careful,"))
    found, layout = cost(stack)
    assert list(found.left_out) == ["encoder(image)"]
    assert "left out       encoder(image): " in str(PlanPage(stack, found, layout))


def valued(folder: Path, text: str) -> Stack:
    """A stack with components that look at values."""
    plugin = folder / "values.py"
    plugin.write_text(VALUES)
    return load_stack(str(write_stack(folder, text)), registry=Registry([plugin]))


# ---- beside others


def test_one_process_of_a_run_plans_alone(tmp_path: Path, two: Pool) -> None:
    overrides = ["train.parallel=fsdp2", "objectives.clip=null"]
    alone = planned(tmp_path, *overrides, world=2).memory
    assert two(first_plans, str(tmp_path / "small.yaml"), overrides) == [
        [getattr(alone, k) for k in KINDS],
        None,
    ]


def first_plans(path: str, overrides: list[str]) -> list[int] | None:
    """The first process plans while the second goes on; no collective of the plan may be waited for."""
    if torch.distributed.get_rank() > 0:
        return None
    found = cost(load_stack(path, overrides), 2)[0].memory
    return [getattr(found, kind) for kind in KINDS]


# ---- checkpoint


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    found = planned(tmp_path)
    engine, inputs = memory.engine_of(load_stack(str(tmp_path / "small.yaml")))
    engine.step(inputs)
    path = checkpoint.save(tmp_path / "checkpoints", 1, engine.state(), {})
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert found.checkpoint_whole == pytest.approx(written, rel=0.05)  # names of tensors come on top
