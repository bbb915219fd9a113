"""Fréchet distance between two sets of features; the maths is torch-fidelity's, with a guard beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to a (n, D) and b (m, D), in float64.

    Raises:
        ArithmeticError: features aren't finite, or the linear algebra of this machine contradicts itself.
    """
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    if min(len(a), len(b)) < 2:
        raise ArithmeticError(f"a Fréchet distance needs two samples a side, not {len(a)} and {len(b)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ArithmeticError("features are not finite: the reconstructions are broken")
    one, two = (fid_features_to_statistics(x.detach().cpu().double()) for x in (a, b))
    distance = float(fid_statistics_to_metric(one, two, verbose=False)[KEY_METRIC_FID])
    own = _symmetric(one, two)
    scale = float(np.trace(one["sigma"]) + np.trace(two["sigma"]))
    if not abs(distance - own) <= 1e-4 * (
        abs(own) + scale
    ):  # a faulty BLAS gives wrong eigenvalues: issue MONAI#9076
        raise ArithmeticError(
            f"two formulas of the Fréchet distance disagree, {distance} and {own}: faulty BLAS?"
        )
    return max(distance, 0.0)


def _symmetric(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """The same distance from symmetric eigenproblems alone."""
    values, vectors = np.linalg.eigh(one["sigma"])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ two["sigma"] @ root)
    shift = float(((one["mu"] - two["mu"]) ** 2).sum())
    spread = np.trace(one["sigma"]) + np.trace(two["sigma"]) - 2 * np.sqrt(middle.clip(0)).sum()
    return float(shift + spread)
