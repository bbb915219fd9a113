"""Latents before they are written: enough of a data set to plan the stage that will train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtp_plugins.protocols import Dataset
from vtp_plugins.spec import Spec


class PromisedLatents:
    """What ``vtp latents`` would make of a data set; every sample is zero.

    Args:
        source: what will be encoded.
        spec: of the tokenizer that will encode it.
        images: whether images will be stored too.
    """

    provides: frozenset[str] = frozenset({"latent"})
    prepared: frozenset[str] = frozenset({"image"})
    splits: tuple[str, ...] = ("train",)

    def __init__(self, source: Dataset, spec: Spec, images: bool = False) -> None:
        self._source, self._spec = source, spec
        kept = {"label", "text", *source.names, *(["image"] if images else [])}
        self.fields = self.provides | {"name"} | (source.fields & kept)
        self.names: Mapping[str, Sequence[str]] = source.names

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        spec = self._spec
        sample: dict[str, Any] = dict.fromkeys(self.fields, 0)
        sample["latent"] = torch.zeros(spec.channels, *spec.grid)
        if "image" in self.fields:
            sample["image"] = torch.zeros(spec.signal_channels, *spec.size, dtype=torch.uint8)
        return sample

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return range(len(self))

    def fingerprint(self) -> str:
        return f"promised of {self._source.fingerprint()}"
