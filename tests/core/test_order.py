"""The order of the data: pure functions, permutations, the same samples for any number of processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from vtp_core.data import order

PINNED = ([1, 4, 5, 0, 2, 6, 3, 7], [20, 23, 18, 22, 19, 21], 139430118705874018724117186389042120154)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_an_epoch_visits_every_sample_once(count: int) -> None:
    assert sorted(order.permutation(count, 5, 2)) == list(range(count))


def test_the_order_is_pinned_for_ever() -> None:
    assert list(order.permutation(8, 0, 0)) == PINNED[0]
    assert order.batch(6, 3, 0) == PINNED[1]
    assert order.key("a", 1) == PINNED[2]


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(order.permutation(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_places_are_uniform() -> None:
    first = np.array([order.permutation(10, seed, 0)[0] for seed in range(3000)])
    assert np.abs(np.bincount(first, minlength=10) - 300).max() < 5 * 300**0.5


def test_windows_visit_every_sample_once_and_stay_near_few_shards() -> None:
    counts = [5, 9, 1, 7, 12, 3, 8]
    epoch = order.Windows(counts, 1, 0, window=2)
    assert len(epoch) == 45
    assert sorted(epoch) == list(range(45))
    shard = np.repeat(np.arange(7), counts)
    read = [int(shard[i]) for i in epoch]
    changes = [set(read[i : i + 4]) for i in range(len(read) - 3)]
    assert max(map(len, changes)) <= 4
    assert list(epoch) == list(order.Windows(counts, 1, 0, window=2))
    assert list(epoch) != list(order.Windows(counts, 1, 1, window=2))
    assert epoch[3:6] == [epoch[3], epoch[4], epoch[5]]


def test_an_order_travels_to_another_process() -> None:
    epoch = order.Windows([5, 9, 1], 1, 0, window=2)
    assert list(pickle.loads(pickle.dumps(epoch))) == list(epoch)


def test_a_window_mixes_its_shards() -> None:
    epoch = order.Windows([50] * 8, 0, 0, window=4)
    assert len({i // 50 for i in epoch[:40]}) == 4


def test_a_step_permutes_its_own_positions() -> None:
    assert sorted(order.batch(8, 3, seed=1)) == list(range(24, 32))
    assert order.batch(8, 3, seed=1) != order.batch(8, 3, seed=2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_first_rows_are_the_same_samples_for_any_number_of_processes(world: int) -> None:
    rows = order.batch(16, 0, 0)
    ours = [order.local(rows, rank, world, 8 // world) for rank in range(world)]
    assert sorted(row for process in ours for row in process) == sorted(rows[:8])
    assert all(len(o) == 8 // world for o in ours)
