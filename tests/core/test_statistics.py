"""Statistics of a latent: whose they are, and who refuses another's."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_core.statistics import check, digest, hashed, hexed, latent_statistics, unhexed


def weights() -> dict[str, Tensor]:
    return {
        "encoder.a": torch.arange(6.0).view(2, 3), "encoder.n": torch.tensor(3), "bottleneck.links.0.w": torch.ones(2),
        "decoder.w": torch.zeros(4),
    }  # fmt: skip


class Fixed:
    """A tokenizer whose latent is its input, and a bench over two batches."""

    spec = SimpleNamespace(channels=3)
    splits = ("train", "val")

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def encode(self, images: Tensor) -> Tensor:
        return images

    def state_dict(self) -> dict[str, Tensor]:
        return weights()

    def images(self, split: str) -> Iterator[Tensor]:
        assert split == "train"
        return iter(self.batches)

    def dataset(self, split: str) -> Any:
        return SimpleNamespace(fingerprint=lambda: f"data of {split}")


def test_a_digest_is_of_what_makes_the_latent_in_any_order() -> None:
    first = digest(weights())
    assert (first.dtype, first.shape) == (torch.uint8, (32,))
    backwards = dict(reversed(weights().items()))
    assert torch.equal(first, digest(backwards))
    assert torch.equal(first, digest(weights() | {"decoder.w": torch.ones(9)}))
    assert torch.equal(
        first, digest({k: v.double() if v.is_floating_point() else v for k, v in weights().items()})
    )
    assert not torch.equal(first, hashed(weights()))


@pytest.mark.parametrize(
    "change",
    [
        {"encoder.a": torch.arange(6.0).view(3, 2)},
        {"encoder.a": torch.arange(6.0).view(2, 3) + 1e-6},
        {"encoder.n": torch.tensor(3.0)},
        {"bottleneck.links.1.w": torch.ones(2)},
    ],
)
def test_every_change_of_the_encoding_changes_the_digest(change: dict[str, Tensor]) -> None:
    assert not torch.equal(digest(weights()), digest(weights() | change))


def test_a_digest_survives_as_text() -> None:
    value = digest(weights())
    assert torch.equal(unhexed(hexed(value)), value)
    for broken in ("", "12", "zz" * 32):
        with pytest.raises(ValueError):  # noqa: PT011 - bytes.fromhex words one of them
            unhexed(broken)


def test_statistics_know_their_tokenizer_and_their_data() -> None:
    z = torch.randn(10, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    z[:, 2] = 0.25
    fixed: Any = Fixed([z[:6], z[6:]])
    found = latent_statistics(fixed, fixed)
    flat = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["mean"], flat.mean(1))
    torch.testing.assert_close(found["std"][:2], flat.std(1)[:2])
    assert found["std"][2] == 1  # a channel that never moves would divide by zero
    assert found["count"] == 10
    assert torch.equal(found["of"], digest(weights()))
    other = latent_statistics(fixed, fixed, limit=7)
    assert other["count"] == 7
    assert torch.equal(other["data"], found["data"])
    check(found, weights())


def test_statistics_of_another_tokenizer_are_refused() -> None:
    fixed: Any = Fixed([torch.randn(4, 3, 2, 2)])
    found = latent_statistics(fixed, fixed)
    moved = weights() | {"encoder.n": torch.tensor(4)}
    with pytest.raises(
        DataFault, match=r"the latents in x belong to the tokenizer \w{12}, not to .*vtp latents"
    ):
        check(found, moved, "the latents in x")
    check(
        {k: v for k, v in found.items() if k != "of"}, moved
    )  # written before statistics knew whose they are
    for broken in ({}, {"mean": torch.zeros(3)}):
        with pytest.raises(DataFault, match="vtp resume RUN"):
            check(broken, moved)
    with pytest.raises(DataFault, match="not finite"):
        check({"mean": torch.zeros(3), "std": torch.zeros(3)}, moved)
