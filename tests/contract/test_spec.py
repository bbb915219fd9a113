"""What a component is told about the tokenizer."""

from __future__ import annotations

import dataclasses

import pytest

from vtp_plugins import Spec


@pytest.mark.parametrize(
    ("size", "patch", "grid", "tokens"),
    [
        ((64, 64), (8, 8), (8, 8), 64),
        ((64, 32), (8, 16), (8, 2), 16),
        ((24000,), (480,), (50,), 50),
        ((16, 32, 32), (4, 8, 8), (4, 4, 4), 64),
        ((0, 0), (1, 1), (0, 0), 0),
    ],
)
def test_grid_and_tokens(
    size: tuple[int, ...], patch: tuple[int, ...], grid: tuple[int, ...], tokens: int
) -> None:
    spec = Spec(size=size, patch=patch)
    assert (spec.grid, spec.tokens) == (grid, tokens)


def test_size_and_patch_have_the_same_axes() -> None:
    with pytest.raises(ValueError, match="zip"):
        _ = Spec(size=(64, 64), patch=(8,)).grid


@pytest.mark.parametrize(
    ("output", "width"),
    [
        ("cls", 32), ("patches", 32), ("patches@block", 32), ("hidden:4", 32), ("hidden:4@block", 32),
        ("latent", 5), ("latent.cls", 5), ("latent.sample", 5), ("latent.quantised", 5), ("latent@block", 5),
    ],
)  # fmt: skip
def test_the_width_of_an_output(output: str, width: int) -> None:
    assert Spec(width=32, channels=5).width_of(output) == width


@pytest.mark.parametrize("output", ["input", "decoded", "indices", "clss", "hidden", "prediction", ""])
def test_an_output_without_a_width_is_told(output: str) -> None:
    with pytest.raises(ValueError, match="is neither a feature"):
        Spec().width_of(output)


def test_a_spec_is_filled_by_copies() -> None:
    spec = Spec(width=32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.width = 3  # type: ignore[misc]
    assert dataclasses.replace(spec, channels=4) == Spec(width=32, channels=4)
    assert hash(spec) == hash(Spec(width=32))
