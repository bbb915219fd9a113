"""A dry run says what a run holds, sends and writes, without data, from tensors without values."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from pool import Pool
from rig import batch_of, engine_of, stack_of
from small import STACK, run, write_stack
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from two import OBJECTIVES, SECTIONS

from benchmarks import memory
from benchmarks.cluster import Cluster
from benchmarks.measuring import peak_bytes
from vtp_core.announcing import announced
from vtp_core.costs import Costs, cost
from vtp_core.data.manifest import FORMAT
from vtp_core.describe import PlanPage
from vtp_core.dryrun.data import dealt
from vtp_core.dryrun.measuring import measure
from vtp_core.dryrun.notes import Collective, Notes
from vtp_core.dryrun.run import DryRun
from vtp_core.dryrun.writing import RATE, Checkpoint
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


# ---- the command


def test_a_dry_run_on_64_processes_needs_neither_data_nor_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = STACK.replace("{use: emoji, batch_size: 16, workers: 0}", "{use: webdataset, batch_size: 256}")
    arguments = ["train", str(write_stack(tmp_path, text)), "--dry-run", "--world-size", "64"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "64 processes (gloo, replicated) x 4 rows x 1 micro-batch = batch_size 256" in out
    assert "clip 4, dino 1, ibot 1, koleo 1, reconstruction 1" in out
    for word in ("optimizer state", "kept by autograd", "all-reduce: gradients", "checkpoint  ", "saving  "):
        assert word in out
    assert (
        "samples are dealt by position: every process opens every shard it needs (data.path: is missing)"
        in out
    )
    assert not torch.distributed.is_initialized()


def test_its_numbers_are_there_for_programs(tmp_path: Path) -> None:
    found = DryRun(load_stack(str(write_stack(tmp_path)), ["train.accumulate=2"]), 2).data
    assert json.loads(json.dumps(found)) == found
    assert found["batch"] == {
        "images": 16, "processes": 2, "micro_batches": 2, "rows": 4,
        "rows_by_objective": {"clip": 4, "dino": 1, "ibot": 1, "koleo": 1, "reconstruction": 1},
    }  # fmt: skip
    gradients = next(row for row in found["communication"] if row["cause"] == "gradients")
    assert gradients["bytes"] == found["memory"]["gradients"]  # a ring of two sends everything once
    (line,) = announced(memory.engine_of(load_stack(str(tmp_path / "small.yaml"), ["train.accumulate=2"]))[0])
    assert found["announced"] == [line.replace("1 process x 8", "2 processes (gloo, replicated) x 4")]
    assert found["checkpoint"]["bytes"] == sum(found["checkpoint"]["files"].values())


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vtp_core.costs.build")
    code, _, errors = run(capsys, "train", "vtp-tiny", "--dry-run", "--world-size", "64")
    assert code == 2
    assert "do not divide by 64 processes" in errors and "use data.batch_size=512" in errors


@pytest.mark.parametrize("typo", ["data.batchsize=3", "probes.rank_me.evry=3"])
def test_a_typo_where_nothing_is_planned_is_refused_too(
    typo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("vtp_core.costs.build")
    code, _, errors = run(capsys, "train", "vtp-tiny", "--dry-run", typo)
    assert code == 2 and f"unknown option '{typo.split('=')[0].rpartition('.')[2]}'" in errors


@pytest.mark.slow
def test_vtp_l_on_64_processes_takes_no_minute(capsys: pytest.CaptureFixture[str]) -> None:
    import time

    began = time.process_time()
    code, out, _ = run(capsys, "train", "vtp-l", "--dry-run", "--world-size", "64")
    assert code == 0 and "x 256 rows x 1 micro-batch = batch_size 16384" in out
    assert time.process_time() - began < 60


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


# ---- checkpoint and shards


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    found = planned(tmp_path)
    engine, inputs = memory.engine_of(load_stack(str(tmp_path / "small.yaml")))
    engine.step(inputs)
    path = checkpoint.save(tmp_path / "checkpoints", 1, engine.state(), {})
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert found.checkpoint_whole == pytest.approx(written, rel=0.05)  # names of tensors come on top


def test_a_save_that_outlasts_the_grace_period_comes_with_advice() -> None:
    assert not Checkpoint({"tokenizer": 10}, 1, 10).advice
    large = int(50 * RATE)
    assert (
        "--shutdown-timeout 100, or train.parallel=fsdp2" in Checkpoint({"optimizer": large}, 1, large).advice
    )
    assert "fsdp2" not in Checkpoint({"optimizer": large}, 8, 8 * large).advice


def test_shards_are_told_from_the_manifest_and_not_opened(tmp_path: Path) -> None:
    names = [f"{index}.tar" for index in range(10)]
    for name in names:
        (tmp_path / name).touch()
    shards = [{"name": n, "bytes": 1, "sha256": "0" * 64, "samples": 20, "fields": ["image"]} for n in names]
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "shards": shards, "names": {}}))
    found = dealt(load_stack("vtp-tiny", ["data.use=webdataset", f"data.path={tmp_path}"]))
    assert (len(found.shards), found.samples, found.window) == (10, 200, 8)
    assert dealt(load_stack("vtp-tiny")).unknown == "emoji has no manifest"


# ---- the simulation


def test_a_cluster_sends_in_rings_within_machines_and_among_them() -> None:
    cluster = Cluster(inside=100.0, outside=10.0, call=0.0, doubling=0.0)
    reduce, gather = (Collective(kind, "gradients", "", 800) for kind in ("all_reduce", "all_gather"))
    assert cluster.seconds(gather, 1) == 0
    assert cluster.seconds(gather, 4) == pytest.approx(3 / 4 * 800 / 100)
    assert cluster.seconds(gather, 16) == pytest.approx(7 / 8 * 800 / 100 + 1 / 2 * 100 / 10)
    assert cluster.seconds(reduce, 16) == pytest.approx(2 * cluster.seconds(gather, 16))
    with pytest.raises(ValueError, match="12 GPUs fill no whole number of machines of 8"):
        cluster.seconds(reduce, 12)


def test_a_step_that_has_no_room_on_a_gpu_is_told() -> None:
    assert Cluster().fits(76 * 10**9) and not Cluster().fits(77 * 10**9)
