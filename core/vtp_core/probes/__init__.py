"""Measuring a tokenizer: probes run over one bench that reads and encodes each split once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vtp_core.errors import DataFault

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench, Probe
    from vtp_plugins.reading import Reading


class LeftOut(Exception):
    """A probe can't be taken of this tokenizer and this data; the message says why and what would help."""


def run_probes(
    tokenizer: Any, probes: Mapping[str, Probe], bench: Bench, generator: Any = None
) -> tuple[list[Reading], list[str]]:
    """Readings of all probes, and one line for each probe, or part of one, that was left out.

    Args:
        tokenizer: in eval mode.
        probes: by instance name. A probe may have ``notes``, lines on parts that its last call left out.
        bench: of that tokenizer.
        generator: in eval mode, for probes whose ``subject`` is ``generator``; they are left out without it.
    """
    subjects = {"tokenizer": tokenizer, "generator": generator}
    fields = bench.dataset(bench.splits[0]).fields
    readings: list[Reading] = []
    left_out: list[str] = []
    for name, probe in probes.items():
        if missing := sorted(probe.fields - fields):
            left_out.append(f"probes.{name} left out: the dataset has no {', '.join(missing)}")
            continue
        subject = getattr(probe, "subject", "tokenizer")
        if subject != "tokenizer" and subjects.get(subject) is None:
            left_out.append(f"probes.{name} left out: it measures a {subject}, and the stack has none")
            continue
        try:
            readings += probe(subjects[subject], bench)
        except (LeftOut, DataFault) as error:
            left_out.append(f"probes.{name} left out: {error}")
        left_out += [f"probes.{name}: {line}" for line in getattr(probe, "notes", ())]
    return readings, left_out


def unseen(bench: Bench, splits: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The splits a probe measures: those asked for, else all but the one that is trained on.

    Raises:
        LeftOut: the dataset lacks one that is asked for.
    """
    if lacking := [split for split in splits if split not in bench.splits]:
        raise LeftOut(f"the dataset has no split {', '.join(lacking)}; it has {', '.join(bench.splits)}")
    return splits or tuple(bench.splits[1:]) or tuple(bench.splits)


def up_to(limit: int | None, batches: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Batches until ``limit`` rows, the last one cut; without a limit all of them."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        yield tuple(x[:left] for x in batch)
        left -= len(batch[0])
        if left <= 0:
            return
