"""Is the nearest image in feature space of the same concept, the same class? Pixels answer beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_core.probes import unseen
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench

ROWS = 1024  # of one block of the similarity matrix


@dataclass(frozen=True)
class _Gallery:
    """Rows of a split that queries are compared with."""

    name: str
    split: str
    rows: Tensor
    about: str


class KNN:
    """1-NN by cosine on ``cls``, mean-pooled ``patches``, mean-pooled ``latent``, and on 8x8 pixels.

    Queries of a split meet, each under its own name (``knn/cls/concept@google``):
    ``@train``, the whole split that is trained on; ``@<style>``, its part in one art style; ``@itself``,
    the split without the query. A gallery that holds no query's concept isn't asked for concepts.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them all but the one that is trained on.
        features: what is compared.
        match: integer fields that a neighbour should share, those that the data has.
        pixels: side of the pixel baseline; 0 for none.
        style: name of the style of the one-style gallery; without it the first of the trained ones.
    """

    fields: frozenset[str] = frozenset()

    def __init__(
        self,
        spec: Spec,
        *,
        splits: tuple[str, ...] = (),
        features: tuple[str, ...] = ("cls", "patches", "latent"),
        match: tuple[str, ...] = ("concept", "label"),
        pixels: int = 8,
        style: str | None = None,
    ) -> None:
        self.splits, self.features, self.match = splits, features, match
        self.pixels, self.style = pixels, style

    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        return [
            reading
            for split in unseen(bench, self.splits)
            for gallery in self._galleries(bench, split)
            for reading in self._readings(bench, split, gallery)
        ]

    def _galleries(self, bench: Bench, split: str) -> list[_Gallery]:
        trained = bench.splits[0]
        itself = _Gallery(
            "itself", split, torch.arange(len(bench.features(split)["cls"])), f"{split} without the query"
        )
        if split == trained:
            return [itself]
        rows = bench.features(trained)
        out = [_Gallery(trained, trained, torch.arange(len(rows["cls"])), f"all of {trained}")]
        if "style" in rows and len(set(rows["style"])) > 1:
            names = bench.dataset(trained).names["style"]
            style = names.index(self.style) if self.style else min(rows["style"])
            chosen = (torch.tensor(rows["style"]) == style).nonzero().flatten()
            out.insert(0, _Gallery(names[style], trained, chosen, f"{trained} in style {names[style]}"))
        return [*out, itself]

    def _readings(self, bench: Bench, split: str, gallery: _Gallery) -> list[Reading]:
        rows, others = bench.features(split), bench.features(gallery.split)
        fields = [
            field for field in self.match if field in rows and _shared(rows[field], others[field], gallery)
        ]
        if not fields:
            return []
        out = []
        for name in (*self.features, *((f"pixels{self.pixels}",) if self.pixels else ())):
            queries, keys = self._vectors(bench, split, name), self._vectors(bench, gallery.split, name)
            nearest = gallery.rows[nearest_neighbours(queries, keys[gallery.rows], gallery.name == "itself")]
            for field in fields:
                own, theirs = torch.tensor(rows[field]), torch.tensor(others[field])
                share = (theirs[nearest] == own).double().mean().item()
                protocol = f"cosine 1-NN, {len(gallery.rows)} images: {gallery.about} | same {field}"
                out.append(Reading(f"knn/{name}/{field}@{gallery.name}", split, share, len(own), protocol))
        return out

    def _vectors(self, bench: Bench, split: str, name: str) -> Tensor:
        if name.startswith("pixels"):
            return torch.cat([self._shrunk(x) for x in bench.images(split)])
        found: Tensor = bench.features(split)[name]
        return found

    def _shrunk(self, images: Tensor) -> Tensor:
        small = F.interpolate(images, (self.pixels, self.pixels), mode="bilinear", antialias=True)
        return small.flatten(1).cpu()  # (B, 3, 8, 8) -> (B, 192)


def _shared(own: list[int], theirs: list[int], gallery: _Gallery) -> bool:
    """Whether a query can find its like: among others for ``itself``, in the gallery otherwise."""
    if gallery.name == "itself":
        return len(set(own)) < len(own)
    return not set(own).isdisjoint(theirs[i] for i in gallery.rows.tolist())


def nearest_neighbours(queries: Tensor, gallery: Tensor, leave_one_out: bool = False) -> Tensor:
    """Index of each query's nearest row by cosine, (n,); ``leave_one_out`` where both are the same rows."""
    keys = F.normalize(gallery, dim=1)
    out = []
    for start in range(0, len(queries), ROWS):
        scores = F.normalize(queries[start : start + ROWS], dim=1) @ keys.T
        if leave_one_out:
            scores.diagonal(start).fill_(-torch.inf)
        out.append(scores.argmax(1))
    return torch.cat(out)
