"""One set of images against another, wherever they are: what ``python -m vtp_fidelity`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtp_core.errors import DataFault, StackFault
from vtp_fidelity.frechet import Gaussian
from vtp_fidelity.networks import METRICS, Extracted, Features, Layer, Metric, Network, extracted, network
from vtp_fidelity.pixels import Crop, Rounding
from vtp_fidelity.sources import Source, opened
from vtp_fidelity.values import values
from vtp_plugins import Reading


def measure(
    samples: Any,
    reference: Any,
    *,
    features: Features = "lite0",
    layer: Layer | None = None,
    metrics: Sequence[Metric] = (),
    size: int | None = None,
    crop: Crop = "adm",
    rounding: Rounding = "round",
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> tuple[list[Reading], list[str]]:
    """Metrics of samples against a reference, and notes on what to mind.

    Args:
        samples: images (n, 3, H, W), float in [0, 1] or uint8; a folder of pictures; or an npz.
        reference: the same, or an npz with ``mu`` and ``sigma`` for FID.
        features: ``lite0`` or ``inception``.
        layer: of lite0: ``block10`` or ``pool``.
        metrics: of ``fd``, ``kid``, ``is``, ``pr``; without them all that the reference allows.
        size: side that pictures of a folder are cropped to.
        crop: ``adm``, ``square`` or ``bilinear``.
        rounding: how floats become bytes.
        batch_size: images at once.
        device: where the network runs.

    Raises:
        StackFault: the two don't compare: images of two sizes, statistics of other features.
        DataFault: images, statistics or weights are missing or broken.
    """
    fake, real = (opened(x, size=size, crop=crop, rounding=rounding) for x in (samples, reference))
    _check_comparable(fake, real, features)
    chosen = tuple(metrics) or (METRICS if len(real) else ("fd", "is"))
    sides = fake.size or (0, 0)
    net = network(features, layer, max(96, min(sides)), device)
    try:
        mine = extracted(net, fake.batches(batch_size), logits="is" in chosen)
        target = real.gaussian if features == "inception" else None
        theirs = _features_of(net, real, chosen, target, batch_size)
        found = {metric: values(net, (metric,), mine, theirs, target) for metric in chosen}
    except ArithmeticError as error:
        raise DataFault(str(error)) from error
    bytes_ = f"{sides[0]}x{sides[1]} px uint8" + (f", {crop} crop" if size else "")
    readings = []
    for metric, list_ in found.items():
        against = _against(real, metric, target)
        for v in list_:
            how = f"{len(fake)} samples{against}{_balance(fake)} | {bytes_} | {v.how}"
            readings.append(Reading(v.name, "samples", v.value, len(fake), how))
    return readings, _notes(fake, real, chosen, target)


def _check_comparable(fake: Source, real: Source, features: Features) -> None:
    if not len(fake):
        raise StackFault("the samples hold statistics alone; images are wanted, statistics do as a reference")
    if len(real) and fake.size != real.size:
        (h, w), (y, x) = fake.size or (0, 0), real.size or (0, 0)
        raise StackFault(
            f"samples are {h}x{w}, the reference is {y}x{x}: numbers across sizes mean nothing; "
            "--size N --crop adm makes pictures of a folder N x N"
        )
    if not len(real) and features != "inception":
        raise StackFault(
            "the reference holds statistics alone, of Inception's features; add --features inception"
        )


def _features_of(
    net: Network, real: Source, chosen: Sequence[Metric], target: Gaussian | None, rows: int
) -> Extracted | None:
    """Features of the reference where some metric reads them."""
    read = {"kid", "pr"} | (set() if target else {"fd"})
    return extracted(net, real.batches(rows)) if len(real) and read & set(chosen) else None


def _against(real: Source, metric: Metric, target: Gaussian | None) -> str:
    if metric == "is":
        return ""
    if metric == "fd" and target is not None:
        return f" against the statistics of reference {real.identity}"
    return f" against {len(real)} of reference {real.identity}"


def _balance(fake: Source) -> str:
    """How many samples each label has, where labels are known."""
    if fake.labels is None:
        return ""
    counts = fake.labels.unique(return_counts=True)[1]
    low, high = int(counts.min()), int(counts.max())
    return f" | {low if low == high else f'{low} to {high}'} of each of {len(counts)} labels"


def _notes(fake: Source, real: Source, chosen: Sequence[Metric], target: Gaussian | None) -> list[str]:
    notes = []
    sets = {"kid", "pr"} | (set() if target else {"fd"})
    if len(real) and len(real) != len(fake) and sets & set(chosen):
        notes.append(
            f"{len(fake)} samples against {len(real)}: these distances have a bias that depends on both numbers"
        )
    if len(fake) < 2048 and target is not None:
        notes.append(
            f"{len(fake)} samples are fewer than the 2048 dimensions of FID; published ones have 50,000"
        )
    return notes
