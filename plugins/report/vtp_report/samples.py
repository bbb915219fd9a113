"""Which samples are shown: drawn by the seed, the same on every call."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vtp_report.record import AbsentError

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench


POOL = 128  # pictures that samples are drawn from: the bench hands them out in random order


def chosen(count: int, among: int, seed: int, purpose: str) -> list[int]:
    """``count`` of the numbers below ``among``, rising; a pure function of its arguments."""
    draw = random.Random(f"{seed}/{purpose}")
    return sorted(draw.sample(range(among), min(count, among)))


def drawn(bench: Bench, split: str, count: int, seed: int, purpose: str) -> dict[int, Tensor]:
    """``count`` images (ch, h, w) by place, of the first few that the bench can read."""
    pool = gather(bench, split, range(POOL))
    if not pool:
        raise AbsentError(f"split {split} has no samples")
    return {place: pool[place] for place in chosen(count, len(pool), seed, purpose)}


def gather(bench: Bench, split: str, indices: Iterable[int]) -> dict[int, Tensor]:
    """Images (ch, h, w) of ``split`` by place in the bench's order; reading stops after the last one.

    Raises:
        AbsentError: the signals are no pictures.
    """
    wanted, found, start = set(indices), {}, 0
    for batch in bench.images(split):
        if batch.ndim != 4 or batch.shape[1] not in {1, 3}:
            raise AbsentError("the signals of this run are no pictures")
        for index in sorted(wanted & set(range(start, start + len(batch)))):
            found[index] = batch[index - start].detach().cpu()
        start += len(batch)
        if not wanted - found.keys():
            break
    return found


def query_split(bench: Bench) -> str:
    """Where questions come from: the first split that was not trained on, else the one there is."""
    return bench.splits[min(1, len(bench.splits) - 1)]


def caption(texts: Sequence[str | None] | None, index: int) -> str:
    """The caption of a sample, or its number."""
    return (texts[index] if texts else None) or f"sample {index}"
