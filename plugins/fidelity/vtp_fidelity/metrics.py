"""KID, Inception Score, precision and recall of given features; the maths is torch-fidelity's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SEED = 2020  # torch-fidelity's, of subsets and permutations
SUBSETS, SUBSET = 100, 1000
SPLITS = 10
NEIGHBOURS = 3


def kid(
    fake: Tensor, real: Tensor, subsets: int | None = None, size: int | None = None, seed: int = SEED
) -> tuple[float, float]:
    """Kernel distance (arXiv 1801.01401): unbiased squared MMD with the kernel (x.y / D + 1)^3.

    Args:
        fake: (n, D).
        real: (m, D).
        subsets: how many are averaged; without it 100, or 1 where a subset is all there is.
        size: of a subset; without it 1000, or the smaller set's.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over subsets. The mean may be slightly negative.

    Raises:
        ArithmeticError: features are not finite, or too few.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    usual = kid_subsets(len(fake), len(real))
    subsets, size = subsets or usual[0], size or usual[1]
    _check(fake, real, least=max(size, 2))
    found = kid_features_to_metric(
        *_both(fake, real), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def kid_subsets(n: int, m: int) -> tuple[int, int]:
    """Subsets and their size for sets of n and m: torch-fidelity's, or the whole sets where they are small."""
    size = min(SUBSET, n, m)
    return (1 if size == n == m else SUBSETS), size


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """Exponential of the mean KL from p(y) to p(y|x) (arXiv 1606.03498): mean and deviation over splits.

    Args:
        logits: (n, classes) of a classifier.
        splits: parts of a random permutation; the score is at most n / splits.
        seed: of the permutation.

    Raises:
        ArithmeticError: logits are not finite, or fewer than splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    _check(logits, least=splits)
    found = isc_features_to_metric(logits.detach().cpu().float(), splits, True, seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def precision_recall(
    fake: Tensor, real: Tensor, neighbours: int = NEIGHBOURS, batch: int = 10_000
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): shares inside the other set's k-neighbour balls.

    Args:
        fake: (n, D).
        real: (m, D).
        neighbours: k.
        batch: rows whose distances are held at once.

    Raises:
        ArithmeticError: features are not finite, or not more than ``neighbours``.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _check(fake, real, least=neighbours + 1)
    found = prc_features_to_metric(
        *_both(fake, real),
        prc_neighborhood=neighbours,
        prc_batch_size=batch,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def _both(fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    return fake.detach().cpu().float(), real.detach().cpu().float()


def _check(*sets: Tensor, least: int) -> None:
    for x in sets:
        if len(x) < least:
            raise ArithmeticError(f"{len(x)} samples are too few; this metric needs {least} a side")
        if not x.isfinite().all():
            raise ArithmeticError("features are not finite: the images are broken")
