"""What runs whose weights are dealt over processes do, in one of several processes or alone."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import ItemsView
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.distributed import batch_of, engine_of
from benchmarks.distributed_cases import TEACHER, Case, cases
from vtp_core import shards
from vtp_core.announcing import announced
from vtp_core.dealing import Dealer
from vtp_core.engine import Engine
from vtp_core.errors import StorageFault
from vtp_core.run import checkpoint
from vtp_core.teacher import EMATeacher, momentum_at
from vtp_core.tokenizer import Tokenizer

Found = dict[str, Any]
CUT: dict[str, Any] = {
    **TEACHER,
    "objectives": {
        "koleo": {},
        "align": {"to": "lite0", "resize": "bilinear", "projector": "linear", "detach": "student"},
    },
}
"""In the second stage an objective is handed what the encoder gives, and cuts it off."""


def built(name: str, **train: Any) -> Engine:
    """The engine of a stack of :mod:`benchmarks.distributed_cases`."""
    return engine_of(Case("cut", CUT) if name == "cut" else cases()[name], **train)


def trained(name: str, steps: int = 2, train: dict[str, Any] | None = None) -> Found:
    """Losses, gradient norms and whole weights of some steps, with dealt weights where there are several processes."""
    engine = built(name, **{"parallel": "fsdp2", "steps": max(steps, 20), **(train or {})})
    return {"said": announced(engine), **_onward(engine, 0, steps)}


def _onward(engine: Engine, first: int, steps: int) -> Found:
    rows = [engine.step(batch_of(engine, step)) for step in range(first, steps)]
    return {"rows": rows, "state": whole(engine)}


def whole(engine: Engine) -> dict[str, Tensor]:
    """A copy of everything that a checkpoint would hold, with all rows."""
    return {
        f"{part}/{key}": shards.whole(value).clone()
        for part, tensors in engine.state().items()
        for key, value in tensors.items()
    }


def loss_error(found: Found, alone: Found, besides: tuple[str, ...] = ("grad/", "weight/")) -> float:
    """The largest relative error of a loss or one of its terms at any step."""
    worst = 0.0
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        losses = {k: v for k, v in theirs.items() if not k.startswith(besides)}
        worst = max(worst, *(abs(ours[k] - v) / max(abs(v), 1e-2) for k, v in losses.items()))
    return worst


def row_error(found: Found, alone: Found) -> float:
    """The same, of gradient norms and weights of losses too."""
    return loss_error(found, alone, ("nothing",))


def total_error(found: Found, alone: Found) -> float:
    """The largest relative error of the loss of any step."""
    pairs = zip(found["rows"], alone["rows"], strict=True)
    return max(abs(ours["loss"] - theirs["loss"]) / abs(theirs["loss"]) for ours, theirs in pairs)


def state_error(found: Found, alone: Found, besides: str = "nothing") -> float:
    """The largest relative error of a tensor of the state; one that is nearly zero counts by what it is off."""
    ours, theirs = found["state"], alone["state"]
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(
        float((ours[k].double() - v.double()).norm() / v.double().norm().clamp(min=1e-3))
        for k, v in theirs.items()
        if not k.startswith(besides)
    )


# ---- stopping and going on


def stopped(name: str, at: int, steps: int, folder: str, train: dict[str, Any]) -> Found:
    """A run that saves on its way."""
    engine = built(name, **train)
    for step in range(at):
        engine.step(batch_of(engine, step))
    checkpoint.save(Path(folder), at, engine.state(), {})
    return _onward(engine, at, steps)


def resumed(name: str, steps: int, folder: str, train: dict[str, Any]) -> Found:
    """The rest of it, from what was saved."""
    engine, path = built(name, **train), checkpoint.latest(Path(folder))
    assert path is not None
    engine.load(checkpoint.opened(path), checkpoint.step_of(path))
    return _onward(engine, checkpoint.step_of(path), steps)


# ---- parts


def averaged(dtype: torch.dtype) -> tuple[float, bool]:
    """500 steps of copies: how far a dealt one is from the closed form, and whether it is a whole one's bits."""
    torch.manual_seed(0)
    steps, start = 500, nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 1)).to(dtype)
    students = []
    for dealt in (False, True):
        student = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 1)).to(dtype)
        student.load_state_dict(start.state_dict())
        teacher = EMATeacher({"it": student})
        if dealt:
            deal = Dealer(torch.device("cpu"), "float32")
            for module in (student, teacher.modules["it"]):
                deal(module, split=False)
            teacher.bind()
        students.append((student, teacher))
    momenta = [momentum_at(step / steps, (0.992, 1.0)) for step in range(steps)]
    left = [torch.tensor(momenta[step:], dtype=torch.float64).prod() for step in range(steps + 1)]
    closed = [left[0] * p.detach().double() for p in start.parameters()]
    for step, momentum in enumerate(momenta):
        for index, parameter in enumerate(start.parameters()):
            parameter.data.add_(0.02 * torch.randn(parameter.shape).to(dtype))
            closed[index] += (1 - momentum) * left[step + 1] * parameter.detach().double()
        for student, teacher in students:
            own = shards.dealt(student.state_dict(), start.state_dict())
            student.load_state_dict(dict(own))
            teacher.update(momentum)
    plain, dealt_ = ([shards.whole(p) for p in t.modules["it"].parameters()] for _, t in students)
    far = max(float((a.double() - b).abs().max()) for a, b in zip(dealt_, closed, strict=True))
    return far, all(torch.equal(a, b) for a, b in zip(plain, dealt_, strict=True))


def narrow() -> Found:
    """Dtypes that weights, gradients and optimizers have in a bfloat16 run, and its rows."""
    engine = built("vtp with a generator", parallel="fsdp2", precision="bfloat16")
    seen: dict[str, set[torch.dtype]] = {}
    for name, module in engine.model.modules().items():
        if name in engine.sharding.roots:
            note = seen.setdefault(name, set())
            module.register_forward_pre_hook(
                lambda module, *_, note=note: note.update(
                    p.dtype for p in module.parameters() if p.ndim and not shards.is_shard(p)
                )
            )
    engine.optimizers.optimizers["sgd"].register_step_pre_hook(
        lambda optimizer, *_: seen.setdefault("gradients", set()).update(
            p.grad.dtype for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )
    )
    rows = [engine.step(batch_of(engine, step)) for step in range(2)]
    return {"rows": rows, "seen": seen, "kept": {value.dtype for value in whole(engine).values()}}


def looked_at() -> Found:
    """What one process by itself does with the modules that a probe is given."""
    engine = built("vtp", parallel="fsdp2", precision="float64")
    engine.step(batch_of(engine, 0))
    found: Found = {}
    with engine.whole() as (model, _):
        tokenizer = Tokenizer(model, model.objectives).eval()
        if engine.rank == engine.world - 1:
            torch.manual_seed(0)
            images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
            z = tokenizer.encode(images)
            found = {
                "z": z, "decoded": tokenizer.decode(z), "embedded": tokenizer.embed_image(images),
                "inside": tokenizer.intermediate(images, 2)[0].patches, "texts": tokenizer.embed_text(["a cup"]),
            }  # fmt: skip
    engine.step(batch_of(engine, 1))
    return found


# ---- checkpoints


def rows_of_a_layer(seed: int) -> dict[str, dict[str, Tensor]]:
    """A dealt layer of 5 x 64 numbers, a number that all hold, and a part that nobody deals."""
    torch.manual_seed(seed)
    layer = Dealer(torch.device("cpu"), "float32")(nn.Linear(64, 5), split=False)
    return {
        "layer": {**layer.state_dict(), "count": torch.tensor(seed)},
        "plain": {"x": torch.arange(3.0) + seed},
    }


def saved(folder: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        checkpoint.save(Path(folder), seed, rows_of_a_layer(seed), {"seed": seed}, keep=3)


def saved_whole(folder: str) -> None:
    """As processes do that hold all weights alike."""
    torch.manual_seed(0)
    checkpoint.save(Path(folder), 1, {"layer": nn.Linear(64, 5).state_dict()}, {})


def crowded(folder: str) -> str:
    """The fault where the disk of the last process is full; then it has room again."""
    saved(folder, (1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == dist.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(StorageFault) as caught:
            saved(folder, (2,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()  # the first process tidies up
    left = sorted(path.name for path in Path(folder).iterdir())
    assert left == ["step-00000001"], left
    dist.barrier()  # all have looked
    saved(folder, (3,))
    return str(caught.value)


class Deadly(dict[str, Tensor]):
    """Tensors that kill the process which saves them."""

    def items(self) -> ItemsView[str, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().items()


def killed(folder: str, rank: int) -> None:
    saved(folder, (1,))
    parts = rows_of_a_layer(2)
    if dist.get_rank() == rank:
        parts["plain"] = Deadly(parts["plain"])
    checkpoint.save(Path(folder), 2, parts, {})
