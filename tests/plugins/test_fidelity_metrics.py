"""Metrics of given features against torch-fidelity's stored values, and the distance against a square root."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_fidelity.frechet import distance, fitted, frechet_distance, symmetric
from vtp_fidelity.metrics import inception_score, kid, kid_subsets, precision_recall

GOLDEN = Path(__file__).parents[1] / "golden" / "ifid"


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(GOLDEN / "frechet.safetensors")


@pytest.mark.parametrize(
    ("one", "two", "key"),
    [
        ("f1", "f2", "fid.f1_f2"),
        ("f2", "f1", "fid.f2_f1"),
        ("f1", "f2", "fid.f1_f2_double_features"),
        ("f1", "f2", "sqrtm_fid.f1_f2"),
        ("f_small1", "f_small2", "fid.small"),  # fewer samples than dimensions
        ("f1", "f1", "fid.f1_f1"),
    ],
)
def test_frechet_distances_are_the_stored_ones(
    stored: dict[str, Tensor], one: str, two: str, key: str
) -> None:
    expected = stored[f"out.{key}"].item()
    assert frechet_distance(stored[f"in.{one}"], stored[f"in.{two}"]) == pytest.approx(expected, abs=1e-5)
    a, b = fitted(stored[f"in.{one}"]), fitted(stored[f"in.{two}"])
    assert symmetric(a, b) == pytest.approx(distance(a, b), rel=1e-6, abs=1e-6)


def test_statistics_are_the_stored_ones(stored: dict[str, Tensor]) -> None:
    for name in ("f1", "f2", "f_small1", "f_small2"):
        found = fitted(stored[f"in.{name}"])
        np.testing.assert_allclose(found.mu, stored[f"out.{name}.mu"].numpy(), atol=2e-6)
        np.testing.assert_allclose(found.sigma, stored[f"out.{name}.sigma"].numpy(), atol=5e-6)


def test_the_distance_is_that_of_a_matrix_square_root() -> None:
    linalg = pytest.importorskip("scipy.linalg", reason="scipy, whose square root is the yardstick")
    draw = torch.Generator().manual_seed(5)
    x = (
        torch.randn(400, 48, generator=draw, dtype=torch.float64)
        @ torch.randn(48, 48, generator=draw).double()
    )
    a, b = fitted(x[:200]), fitted(x[200:] * 1.3 + 0.2)
    root = linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("shape", [(60, 112), (300, 112), (100, 512)])
def test_a_set_is_at_no_distance_from_itself(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 3
    assert frechet_distance(x, x) < 1e-3
    assert frechet_distance(x, x.flip(0)) < 1e-3


def test_kid_score_precision_and_recall_are_the_stored_ones(stored: dict[str, Tensor]) -> None:
    one, two = stored["in.f1"], stored["in.f2"]
    mean, std = kid(one, two, subsets=5, size=20)
    assert (mean, std) == pytest.approx(
        (stored["out.kid.mean"].item(), stored["out.kid.std"].item()), abs=2e-5
    )
    mean, std = inception_score(stored["in.logits"], splits=5)
    assert (mean, std) == pytest.approx(
        (stored["out.isc.mean"].item(), stored["out.isc.std"].item()), abs=1e-6
    )
    shares = precision_recall(one, two, batch=16)
    assert shares == (stored["out.prc.precision"].item(), stored["out.prc.recall"].item())


def test_kid_of_small_sets_is_the_unbiased_estimate_over_all_pairs() -> None:
    draw = torch.Generator().manual_seed(7)
    x, y = (torch.randn(30, 6, generator=draw, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    assert kid_subsets(30, 30) == (1, 30)
    assert kid_subsets(5000, 9000) == (100, 1000)

    def mean(a: Tensor, b: Tensor, own: bool) -> float:
        k = (a @ b.T / 6 + 1) ** 3
        return float((k.sum() - k.diagonal().sum()) / (30 * 29) if own else k.mean())

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-4)


def test_certain_and_even_classes_score_as_many_as_there_are() -> None:
    logits = 50 * torch.eye(4).repeat(25, 1)
    assert inception_score(logits, splits=1)[0] == pytest.approx(4, rel=1e-6)
    assert inception_score(torch.zeros(100, 4), splits=1)[0] == pytest.approx(1, rel=1e-6)


def test_samples_of_one_mode_are_precise_and_recall_little() -> None:
    draw = torch.Generator().manual_seed(8)
    real = torch.cat([torch.randn(50, 2, generator=draw), torch.randn(50, 2, generator=draw) + 40])
    precision, recall = precision_recall(torch.randn(50, 2, generator=draw), real)
    assert precision > 0.8
    assert recall < 0.55


@pytest.mark.parametrize("metric", [kid, precision_recall])
def test_broken_or_too_few_features_are_errors(metric: object) -> None:
    x = torch.randn(12, 3)
    broken = x.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        metric(x, broken)  # type: ignore[operator]
    with pytest.raises(ArithmeticError, match="too few"):
        metric(x[:1], x[:1])  # type: ignore[operator]
    with pytest.raises(ArithmeticError, match="too few"):
        inception_score(torch.zeros(4, 3))
