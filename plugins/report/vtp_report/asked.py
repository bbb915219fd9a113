"""What a generator is asked for: labels or captions, each with a real image where the data has one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vtp_report.record import AbsentError

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench, Dataset

READ = 1024  # samples read at most, to count labels and to find an image of each
SURE = 4  # a label met this often is a frequent one; below, chance decides

Wanted = int | Sequence[str | int]


@dataclass(frozen=True, slots=True)
class Asked:
    """One condition.

    Attributes:
        name: in words; empty without a condition.
        value: label or caption; None without a condition.
        real: an image of it (ch, h, w) in [0, 1]; None where none was found.
    """

    name: str
    value: int | str | None
    real: Tensor | None = None


def asked(generator: Any, bench: Bench | None, wanted: Wanted) -> list[Asked]:
    """Conditions to show, the same for every run on the same data.

    Args:
        generator: a ``vtp_core.generation.Generator``.
        bench: over the tokenizer's data; None leaves out what only images tell.
        wanted: labels (names or numbers) or captions; or how many. Then labels are the most frequent of the
            data, spread over all of them where none is frequent; captions are those of some samples.

    Raises:
        AbsentError: captions are to be chosen and the data has none.
        StackFault: there is no such label.
    """
    dataset = bench.dataset(bench.splits[0]) if bench is not None else None
    kind = generator.spec.condition
    if kind == "label":
        return _labels(generator, dataset, wanted)
    if kind == "embedding":
        return _captions(generator, dataset, wanted)
    rows = [Asked("", None)] * (wanted if isinstance(wanted, int) else 1)
    found = _samples(dataset) if dataset is not None else iter(())
    reals = [real for sample in _first(found, len(rows)) if (real := _image(generator, sample)) is not None]
    return [replace(row, real=real) for row, real in zip(rows, reals, strict=False)] + rows[len(reals) :]


def _labels(generator: Any, dataset: Dataset | None, wanted: Wanted) -> list[Asked]:
    counts: Counter[int] = Counter()
    examples: dict[int, dict[str, Any]] = {}
    if dataset is not None and generator.condition in dataset.fields:
        for sample in _samples(dataset):
            label = sample.get(generator.condition)
            if label is not None:
                counts[int(label)] += 1
                examples.setdefault(int(label), sample)
    if isinstance(wanted, int):
        chosen = _frequent(counts, wanted, generator.spec.classes)
    else:
        chosen = [generator.label(name) for name in wanted]
    return [Asked(_name(generator, label), label, _image(generator, examples.get(label))) for label in chosen]


def _frequent(counts: Counter[int], wanted: int, classes: int) -> list[int]:
    """The most frequent labels, rising; else labels spread evenly over those that were met, or over all."""
    ranked = counts.most_common(wanted)
    if ranked and ranked[-1][1] >= SURE:
        return sorted(label for label, _ in ranked)
    known = sorted(counts) or list(range(classes))
    count = min(wanted, len(known))
    return [known[place * len(known) // count] for place in range(count)]


def _name(generator: Any, label: int) -> str:
    return str(generator.names[label]) if label < len(generator.names) else f"label {label}"


def _captions(generator: Any, dataset: Dataset | None, wanted: Wanted) -> list[Asked]:
    if not isinstance(wanted, int):
        return [Asked(str(text), str(text)) for text in wanted]
    if dataset is None or generator.condition not in dataset.fields:
        raise AbsentError(f"the data has no {generator.condition} to sample from; name captions as labels=")
    found: dict[str, Asked] = {}
    for sample in _samples(dataset):
        text = sample.get(generator.condition)
        if text and text not in found:
            found[text] = Asked(text, text, _image(generator, sample))
        if len(found) == wanted:
            break
    return list(found.values())


def _samples(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Up to READ samples that can be read, in one fixed random order."""
    import torch

    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for index in order[:READ].tolist():
        try:
            yield dataset[index]
        except (ValueError, OSError):
            continue


def _first(samples: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [sample for _, sample in zip(range(count), samples, strict=False)]


def _image(generator: Any, sample: dict[str, Any] | None) -> Tensor | None:
    """A sample's image as the tokenizer sees it; None for a sample without one."""
    from vtp_core.probes.bench import centre

    if sample is None or sample.get("image") is None:
        return None
    signal: Tensor = centre(generator.tokenizer.spec)(sample["image"])[0]
    return signal.float() / 255 if not signal.is_floating_point() else signal.float()
