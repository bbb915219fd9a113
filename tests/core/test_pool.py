"""The processes that tests share."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from vtp_core.errors import NonFinite


def summed(value: float) -> tuple[int, float]:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return os.getpid(), total.item()


def sick(rank: int) -> None:
    if dist.get_rank() == rank:
        raise NonFinite("step 3: sick")
    dist.barrier()


def dead() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def stuck() -> None:
    while dist.get_rank() == 1:
        time.sleep(0.01)


def test_the_processes_of_a_pool_stay(two: Pool) -> None:
    first, second = two(summed, 1.0), two(summed, 2.0)
    assert [value for _, value in first + second] == [3.0, 3.0, 6.0, 6.0]
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


def test_what_a_process_raises_is_raised_here() -> None:
    pool = Pool(2)
    with pytest.raises(NonFinite, match="sick") as caught:
        pool(sick, 1)
    assert any("in sick" in note for note in caught.value.__notes__)
    pool.close()


@pytest.mark.slow
def test_processes_that_die_or_hang_are_named_and_the_next_call_works() -> None:
    pool = Pool(2)
    with pytest.raises(RuntimeError, match="exit code 9"):
        pool(dead)
    pool(summed, 1.0)
    with pytest.raises(TimeoutError, match=r"stuck hangs in process 1:[\s\S]*in stuck"):
        pool(stuck, timeout=2.0)
    pool.close()
