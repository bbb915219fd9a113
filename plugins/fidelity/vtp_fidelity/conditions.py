"""Which labels or captions samples are drawn for: balanced, random, or as the data has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from vtp_core.probes import LeftOut

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset

Labels = Literal["balanced", "random", "data"]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What n samples are conditioned on, and its words for a protocol; at most one of the two is there."""

    words: str
    labels: list[int] | None = None
    texts: list[str] | None = None

    def part(self, start: int, stop: int) -> dict[str, Any]:
        """Arguments of ``Generator.sample`` for some of them."""
        return {
            "labels": None if self.labels is None else self.labels[start:stop],
            "texts": None if self.texts is None else self.texts[start:stop],
        }


def conditions(
    generator: Any, dataset: Dataset, split: str, n: int, law: Labels | None, seed: int
) -> Conditions:
    """Conditions of n samples of a generator.

    Args:
        generator: tells by ``condition`` which field it takes, and by ``names`` its classes; text has none.
        dataset: of the split, for ``data`` and for captions.
        split: its name.
        n: how many.
        law: without it ``balanced`` for labels; captions are always the data's.
        seed: of random labels and of the choice of samples.

    Raises:
        LeftOut: the law doesn't fit the generator or the data.
    """
    field = generator.condition
    if field is None:
        return Conditions("no condition")
    if not generator.names:
        if law not in (None, "data"):
            raise LeftOut(f"labels={law} is for generators of labels; this one takes {field}, labels=data")
        return Conditions(f"{field} of random samples of {split}", texts=_drawn(dataset, field, n, seed))
    classes = len(generator.names)
    if law == "data":
        return Conditions(f"{field} of random samples of {split}", _drawn(dataset, field, n, seed))
    if law == "random":
        labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
        return Conditions(f"{field} random of {classes}", labels.tolist())
    each = f"{n // classes}" if n % classes == 0 else f"{n // classes} or {n // classes + 1}"
    return Conditions(f"{field} balanced, {each} of each of {classes}", [i % classes for i in range(n)])


def _drawn(dataset: Dataset, field: str, n: int, seed: int) -> list[Any]:
    """The field of n random samples that have it and can be read; where there are fewer, they come again."""
    if field not in dataset.fields:
        raise LeftOut(f"the dataset has no {field}")
    found: list[Any] = []
    for place in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        try:
            value = dataset[place].get(field)
        except (ValueError, OSError):
            continue
        if value is not None:
            found.append(value)
        if len(found) == n:
            return found
    if not found:
        raise LeftOut(f"no sample has a {field}")
    return [found[i % len(found)] for i in range(n)]
