"""Metrics of two sets by the names their features allow, each with the words of its own protocol."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vtp_fidelity import metrics as maths
from vtp_fidelity.frechet import Gaussian, distance, fitted
from vtp_fidelity.networks import Extracted, Metric, Network


@dataclass(frozen=True, slots=True)
class Value:
    """A number, its name, and how it was computed."""

    name: str
    value: float
    how: str


def values(
    network: Network,
    metrics: Collection[Metric],
    fake: Extracted,
    real: Extracted | None,
    reference: Gaussian | None = None,
) -> list[Value]:
    """The metrics of ``fake`` against ``real``.

    Args:
        network: where the features are from.
        metrics: ``fd``, ``kid``, ``is`` (of ``fake`` alone), ``pr`` (precision and recall).
        fake: generated.
        real: what they should look like; None where ``reference`` is all there is and ``fd`` all that is asked.
        reference: statistics for ``fd`` in place of those of ``real``.

    Raises:
        ArithmeticError: sets are too small, not finite, or the linear algebra contradicts itself.
    """
    found: list[Value] = []
    for metric in metrics:
        if metric == "fd":
            target = reference or fitted(_points(real).points)
            value = distance(fitted(fake.points), target)
            found.append(Value(network.names["fd"], value, f"{network.described}, torch-fidelity"))
        elif metric == "is":
            found.append(_score(network, fake))
        elif metric == "kid":
            found.append(_kid(network, fake, _points(real)))
        else:
            found += _shares(network, fake, _points(real))
    return found


def _points(real: Extracted | None) -> Extracted:
    if real is None:
        raise ArithmeticError(
            "the reference holds statistics alone, which give a Fréchet distance and no more"
        )
    return real


def _score(network: Network, fake: Extracted) -> Value:
    assert fake.logits is not None, "extracted(..., logits=True)"
    score, _ = maths.inception_score(fake.logits)
    how = f"{maths.SPLITS} splits, seed {maths.SEED} | {network.scorer}, torch-fidelity"
    return Value(network.names["is"], score, how)


def _kid(network: Network, fake: Extracted, real: Extracted) -> Value:
    mean, _ = maths.kid(fake.points, real.points)
    subsets, size = maths.kid_subsets(len(fake), len(real))
    drawn = f"{subsets} subset{'s' if subsets > 1 else ''} of {size}, seed {maths.SEED}"
    how = f"polynomial kernel, {drawn} | {network.described}, torch-fidelity"
    return Value(network.names["kid"], mean, how)


def _shares(network: Network, fake: Extracted, real: Extracted) -> list[Value]:
    shares = maths.precision_recall(fake.points, real.points)
    how = f"k = {maths.NEIGHBOURS} | {network.described}, torch-fidelity"
    return [Value(network.names[n], x, how) for n, x in zip(("precision", "recall"), shares, strict=True)]
