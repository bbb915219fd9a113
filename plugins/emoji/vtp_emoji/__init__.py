"""1,852 emoji in three art styles at 64 px, with captions and classes, out of an atlas in the package."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtp_core.data.order import permutation
from vtp_plugins.spec import Spec

STYLES = ("google", "fluent", "twitter")
STYLES_OF = {"train": (0, 1), "unseen_style": (2,), "unseen_concept": (0, 1, 2)}

__all__ = ["STYLES", "Emoji"]


@functools.cache
def concepts() -> dict[str, Any]:
    """Captions, classes and the held-out concepts, as ``concepts.json`` has them."""
    text = (resources.files(__name__) / "concepts.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@functools.cache
def tiles(style: str) -> Tensor:
    """All pictures of a style, (n, 3, 64, 64) uint8, decoded once per process; forked workers share it."""
    table = concepts()
    side, columns, count = table["tile"], table["columns"], len(table["codes"])
    with (resources.files(__name__) / f"{style}.webp").open("rb") as stream:
        sheet = np.asarray(Image.open(stream, formats=["WEBP"]).convert("RGB"))
    grid = sheet.reshape(-1, side, columns, side, 3).transpose(0, 2, 4, 1, 3)  # rows, columns, 3, 64, 64
    return torch.from_numpy(grid.reshape(-1, 3, side, side))[:count]


class Emoji:
    """Emoji as images with captions, sub-categories (``label``) and categories.

    ``train`` holds two styles of nine tenths of the concepts, ``unseen_style`` the third style of the same
    concepts, ``unseen_concept`` the other tenth in all three styles.

    Args:
        spec: shapes of the tokenizer; pictures are 64 px whatever it says, and views scale them.
        split: name of the split.
    """

    fields = frozenset({"image", "text", "label", "category", "concept", "style"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train", "unseen_style", "unseen_concept")
    names: Mapping[str, Sequence[str]]

    def __init__(self, spec: Spec | None = None, split: str = "train") -> None:
        if split not in self.splits:
            raise ValueError(f"data: emoji has no split {split!r}; it has {', '.join(self.splits)}")
        table = concepts()
        unseen = frozenset(table["unseen"])
        self.split = split
        self._styles = STYLES_OF[split]
        held_out = split == "unseen_concept"
        self._concepts = [i for i in range(len(table["codes"])) if (i in unseen) == held_out]
        self.names = {
            "label": table["labels"],
            "category": table["categories"],
            "concept": table["captions"],
            "style": STYLES,
        }

    def __len__(self) -> int:
        return len(self._styles) * len(self._concepts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"emoji/{self.split} has {len(self)} samples, no sample {index}")
        atlas = [tiles(STYLES[style]) for style in self._styles]  # all, so that a fork has them
        place, within = divmod(index, len(self._concepts))
        concept = self._concepts[within]
        table = concepts()
        return {
            "image": atlas[place][concept].clone(),
            "text": table["captions"][concept],
            "label": table["label"][concept],
            "category": table["category"][concept],
            "concept": concept,
            "style": self._styles[place],
        }

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        """Captions of samples, without their pictures."""
        captions = concepts()["captions"]
        return [captions[self._concepts[index % len(self._concepts)]] for index in indices]

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """A fresh permutation each epoch."""
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Hash over the atlas files and the split."""
        digest = hashlib.sha256(self.split.encode())
        for name in ("concepts.json", *(f"{style}.webp" for style in STYLES)):
            digest.update((resources.files(__name__) / name).read_bytes())
        return digest.hexdigest()
