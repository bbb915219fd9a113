"""A mix of objectives means the same on any number of processes, recomputed or not, whole or in micro-batches."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from pool import Pool

from benchmarks.distributed import (
    TOLERANCES,
    batch_of,
    contributions,
    engine_of,
    error,
    measured,
    settings,
    spread,
)
from benchmarks.distributed_cases import FULL, GAN, Case, cases, vtp

alone = functools.cache(measured)
SUBSETS = [
    subset
    for size in range(1, 5)
    for subset in itertools.combinations(("clip", "dino", "ibot", "reconstruction"), size)
]


@pytest.mark.parametrize(("precision", "recompute"), list(itertools.product(TOLERANCES, (False, True))))
def test_two_processes_have_the_gradients_of_one(two: Pool, precision: str, recompute: bool) -> None:
    for found in two(measured, "vtp with a gan", precision, recompute):
        assert error(found, alone("vtp with a gan", precision)) <= TOLERANCES[precision]


def test_recomputed_blocks_give_the_same_gradients_bit_for_bit() -> None:
    for name in ("vtp with a generator", "align: repa-e", "gan: features, r1, after, reuse"):
        assert error(measured(name, "float32", recompute=True), alone(name, "float32")) == 0


@pytest.mark.parametrize("name", ["vtp with a gan", "vtp without coupled objectives"])
def test_micro_batches_have_the_gradients_of_the_whole(two: Pool, name: str) -> None:
    one = alone(name, "float64")
    assert error(measured(name, "float64", accumulate=4), one) <= TOLERANCES["float64"]
    for found in two(measured, name, "float64", True, 2):
        assert error(found, one) <= TOLERANCES["float64"]


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_objective_has_the_gradients_of_one_process(
    two: Pool, four: Pool, world: int, name: str
) -> None:
    for setting in settings([name]):
        one = alone(name, setting[1])
        everyone = [measured(*setting)] if world == 1 else {2: two, 4: four}[world](measured, *setting)
        for found in everyone:
            if "refused" in found:
                assert setting[3] > 1 and name == "gan: batch norm, after, fresh"
            else:
                assert error(found, one) <= TOLERANCES[setting[1]]


@pytest.mark.slow
def test_an_objective_pulls_as_much_on_any_number_of_processes(two: Pool, four: Pool) -> None:
    shares = {1: contributions(), 2: two(contributions)[0], 4: four(contributions)[0]}
    assert all(own["spread"] <= 1e-3 for own in spread(shares).values())


# ---- any subset, any schedule


def trained(names: tuple[str, ...], gan: bool) -> list[dict[str, float]]:
    """Five steps in which each objective rests at times; a resting one leaves parameters without a reader."""
    objectives: dict[str, Any] = {name: {**FULL[name]} for name in names}
    if gan:
        objectives |= {"reconstruction": {**FULL["reconstruction"]}, "gan": {**GAN, "start": 2}}
    first, *rest = names
    for name in rest:
        objectives[name] |= {"every": 2} if name != "reconstruction" else {}
    objectives[first] |= {"stop": 4} if len(objectives) > 1 and first != "reconstruction" else {}
    engine = engine_of(Case("subset", vtp(objectives), uneven=True), precision="float32")
    return [engine.step(batch_of(engine, step)) for step in range(5)]


def check_subset(two: Pool, names: tuple[str, ...], gan: bool) -> None:
    one, everyone = trained(names, gan), two(trained, names, gan)
    for rows in everyone:
        for row, own in zip(rows, one, strict=True):
            assert row.keys() == own.keys()
            assert row["loss"] == pytest.approx(own["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("names", "gan"), [(SUBSETS[-1], True), (("clip", "ibot"), False), (("dino",), True)]
)
def test_a_subset_of_objectives_trains_on_two_processes(two: Pool, names: tuple[str, ...], gan: bool) -> None:
    check_subset(two, names, gan)


@pytest.mark.slow
@pytest.mark.parametrize("gan", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_objectives_trains_on_two_processes(
    two: Pool, names: tuple[str, ...], gan: bool
) -> None:
    check_subset(two, names, gan)
