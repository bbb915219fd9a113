"""Fréchet distance between two sets of features; the maths is torch-fidelity's, with a guard beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gaussian:
    """What a Fréchet distance knows of a set: mean (D,) and unbiased covariance (D, D), float64."""

    mu: np.ndarray
    sigma: np.ndarray


def fitted(features: Tensor) -> Gaussian:
    """The Gaussian of features (n, D).

    Raises:
        ArithmeticError: there are fewer than two samples, or features are not finite.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise ArithmeticError(f"a Gaussian is fitted to two samples at least, not {len(features)}")
    if not features.isfinite().all():
        raise ArithmeticError("features are not finite: the images are broken")
    found = fid_features_to_statistics(features.detach().cpu().double())
    return Gaussian(found["mu"], found["sigma"])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to a (n, D) and b (m, D), in float64.

    Raises:
        ArithmeticError: features aren't finite, or the linear algebra of this machine contradicts itself.
    """
    if min(len(a), len(b)) < 2:
        raise ArithmeticError(f"a Fréchet distance needs two samples a side, not {len(a)} and {len(b)}")
    return distance(fitted(a), fitted(b))


def distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2); never negative.

    Raises:
        ArithmeticError: dimensions differ, or two formulas disagree, which a faulty BLAS makes of right statistics.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if a.sigma.shape != b.sigma.shape or b.sigma.shape != (a.mu.size, b.mu.size):
        raise ArithmeticError(f"statistics of {a.mu.size} and {b.mu.size} dimensions don't compare")
    one, two = ({"mu": g.mu, "sigma": g.sigma} for g in (a, b))
    theirs = float(fid_statistics_to_metric(one, two, verbose=False)[KEY_METRIC_FID])
    own = symmetric(a, b)
    scale = float(np.trace(a.sigma) + np.trace(b.sigma))
    # a faulty BLAS gives wrong eigenvalues without a word: issue MONAI#9076
    if not abs(theirs - own) <= 1e-4 * (abs(own) + scale):
        raise ArithmeticError(
            f"two formulas of the Fréchet distance disagree, {theirs} and {own}: faulty BLAS?"
        )
    return max(theirs, 0.0)


def symmetric(a: Gaussian, b: Gaussian) -> float:
    """The same distance from symmetric eigenproblems alone, by the eigenvalues of A^1/2 B A^1/2."""
    values, vectors = np.linalg.eigh(a.sigma)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ b.sigma @ root)
    shift = float(((a.mu - b.mu) ** 2).sum())
    spread = np.trace(a.sigma) + np.trace(b.sigma) - 2 * np.sqrt(middle.clip(0)).sum()
    return float(shift + spread)
