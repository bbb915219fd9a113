from __future__ import annotations

import math

import pytest
import torch
from pool import Pool

from benchmarks.distributed import batch_of, engine_of
from benchmarks.distributed_cases import cases
from vtp_core.agreement import hashes
from vtp_core.clock import StepClock, keyed
from vtp_plugins.clock import Clock


def clocks(world: int, micros: int = 1) -> list[StepClock]:
    return [
        StepClock(world=world, rank=r, micro=m, micros=micros) for r in range(world) for m in range(micros)
    ]


def test_it_keeps_the_contract() -> None:
    assert isinstance(StepClock(), Clock)
    assert StepClock(step=5, steps=20).share == 0.25


@pytest.mark.parametrize(("world", "micros"), [(2, 1), (1, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_rows_meet_the_same_draws_for_any_number_of_processes(world: int, micros: int, draw: str) -> None:
    whole = getattr(StepClock(), draw)("x", 24, 3)
    for clock in clocks(world, micros):
        rows = 24 // (world * micros)
        assert torch.equal(getattr(clock, draw)("x", rows, 3), whole[clock.positions(rows)])


def test_crops_of_a_sample_stay_together() -> None:
    whole = StepClock().of("a", crops=2).normal("x", 8, 3)
    part = StepClock(world=2, rank=1).of("a", crops=2).normal("x", 4, 3)
    assert torch.equal(part, whole.unflatten(0, (4, 2))[1::2].flatten(0, 1))
    with pytest.raises(ValueError, match="no multiple of 2 crops"):
        StepClock().of("a", crops=2).normal("x", 3)


def test_fewer_rows_are_a_prefix() -> None:
    for rows in range(1, 20):
        assert torch.equal(StepClock().normal("x", rows, 5), StepClock().normal("x", 20, 5)[:rows])


def test_streams_differ_by_seed_step_instance_and_name() -> None:
    base = StepClock().normal("x", 64)
    others = [
        StepClock(seed=1).normal("x", 64),
        StepClock(step=1).normal("x", 64),
        StepClock().of("i").normal("x", 64),
    ]
    for other in [*others, StepClock().normal("y", 64)]:
        assert not torch.equal(base, other)
    assert torch.equal(base, StepClock().normal("x", 64))
    assert keyed("a/b", "c") != keyed("a", "b/c")


def test_the_keys_of_a_hundred_thousand_draws_are_distinct() -> None:
    instances = [
        f"{view}/{who}" for view in ("image", "global") for who in ("encoder", "dino", "dino#1", "gan")
    ]
    keys = {
        StepClock(seed=seed, step=step).of(instance)._key(name)
        for seed in range(2)
        for step in range(2100)
        for instance in instances
        for name in ("noise", "u", "drop_path")
    }
    assert len(keys) == 2 * 2100 * len(instances) * 3 > 100_000


def test_no_two_draws_of_a_step_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do objectives; a forward that several of them read draws once, for all."""
    drawn: dict[int, set[tuple[int, str, str]]] = {}
    key_of = StepClock._key

    def noted(clock: StepClock, name: str) -> int:
        drawn.setdefault(key_of(clock, name), set()).add((clock.step, clock.instance, name))
        return key_of(clock, name)

    monkeypatch.setattr(StepClock, "_key", noted)
    for name in (
        "vtp with a generator",
        "gan: group norm, r1, lecam, diffaug, after, reuse",
        "align: repa-e",
    ):
        drawn.clear()
        engine = engine_of(cases()[name])
        for step in range(2):
            engine.step(batch_of(engine, step))
        assert all(len(places) == 1 for places in drawn.values())
        steps = [
            {(i, n) for places in drawn.values() for s, i, n in places if s == step} for step in range(2)
        ]
        assert steps[0] == steps[1] and len(drawn) == 2 * len(steps[0]) > 4


def initial() -> tuple[dict[str, int], torch.Tensor]:
    """Hashes of the weights that a stack begins with, and this process's draws."""
    engine = engine_of(cases()["vtp with a generator"], precision="float32")
    weights = {f"{p}/{k}": int(hashes([v])[0]) for p, own in engine.state().items() for k, v in own.items()}
    return weights, engine._clock(0).of("any").normal("noise", 4, 3)


def test_processes_begin_alike_and_draw_apart_and_so_they_do_again(two: Pool) -> None:
    weights, draws = initial()
    (first, ours), (second, theirs) = two(initial)
    assert first == second == weights
    assert not torch.isin(ours, theirs).any()
    assert torch.equal(draws[0], ours[0]) and torch.equal(draws[1], theirs[0])  # rows of one global batch
    for (again, same), before in zip(two(initial), (ours, theirs), strict=True):
        assert again == weights
        assert torch.equal(same, before)


def test_draws_follow_their_laws() -> None:
    x, u = StepClock().normal("n", 1000, 500).double(), StepClock().uniform("u", 1000, 500).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    cumulative = (x.flatten().sort().values / math.sqrt(2)).erf() / 2 + 0.5
    assert (cumulative - torch.linspace(0, 1, n)).abs().max() < 2 / math.sqrt(n)  # Kolmogorov and Smirnov
    assert u.min() >= 0
    assert u.max() < 1
    assert (u.flatten().sort().values - torch.linspace(0, 1, n)).abs().max() < 2 / math.sqrt(n)
    for shift in (1, 2, 500):
        assert abs((x.flatten()[shift:] * x.flatten()[:-shift]).mean()) < 4 / math.sqrt(n)
    assert abs((x * StepClock(step=1).normal("n", 1000, 500)).mean()) < 4 / math.sqrt(n)


def test_a_generator_is_equal_on_every_process() -> None:
    drawn = {torch.randint(1000, (3,), generator=clock.rng("x")).sum().item() for clock in clocks(4)}
    assert len(drawn) == 1
