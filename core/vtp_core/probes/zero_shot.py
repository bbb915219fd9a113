"""Zero-shot retrieval and classification by text (CLIP, arXiv 2103.00020), over all captions of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_core.probes import LeftOut, unseen
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench

ROWS = 1024  # of one block of the similarity matrix


class ZeroShot:
    """Text to image, image to text, and classes by their names or by their captions.

    Retrieval is among all captions of a split: a caption finds an image if the image has that caption's
    ``concept`` (the caption itself where the data has no concepts). Classification takes the nearest
    class; a class is its name in the ``prompt``, or the mean of the captions that the trained split has
    for it.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them all but the one that is trained on.
        top: a hit is among so many nearest.
        prompt: template of a class name.
        classes: integer fields to classify by, those that the data has.
    """

    fields = frozenset({"text"})

    def __init__(
        self,
        spec: Spec,
        *,
        splits: tuple[str, ...] = (),
        top: tuple[int, ...] = (1, 5),
        prompt: str = "{}",
        classes: tuple[str, ...] = ("label", "category"),
    ) -> None:
        self.splits, self.top, self.prompt, self.classes = splits, top, prompt, classes
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        self._known = {}
        out: list[Reading] = []
        for split in unseen(bench, self.splits):
            rows = bench.features(split)
            has = [i for i, text in enumerate(rows["text"]) if text is not None]
            images = torch.cat([_export(tokenizer, "embed_image", x) for x in bench.images(split)])[has]
            out += self._retrieval(tokenizer, split, images, rows, has)
            out += self._classification(tokenizer, bench, split, images, rows, has)
        return out

    def _embed(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """(n, E); every text is embedded once a call."""
        fresh = sorted(set(texts) - self._known.keys())
        for start in range(0, len(fresh), 256):
            part = fresh[start : start + 256]
            self._known.update(zip(part, _export(tokenizer, "embed_text", part), strict=True))
        return torch.stack([self._known[text] for text in texts])

    def _retrieval(
        self, tokenizer: Any, split: str, images: Tensor, rows: dict[str, Any], has: list[int]
    ) -> list[Reading]:
        key = "concept" if "concept" in rows else "text"
        captions = {rows[key][i]: rows["text"][i] for i in reversed(has)}
        place = {value: i for i, value in enumerate(captions)}
        of_image = torch.tensor([place[rows[key][i]] for i in has])
        texts = self._embed(tokenizer, list(captions.values()))
        own = torch.arange(len(texts))
        pool = f"among {len(texts)} captions and {len(images)} images of the split, match by {key}, cosine"
        chance = {
            "text_to_image": torch.bincount(of_image).double() / len(images),
            "image_to_text": torch.tensor(1 / len(texts)),
        }
        found = {
            "text_to_image": _best_ranks(texts, images, own, of_image),
            "image_to_text": _best_ranks(images, texts, of_image, own),
        }
        return [
            Reading(
                f"zero_shot/{way}_top{top}",
                split,
                (ranks < top).double().mean().item(),
                len(ranks),
                f"{pool} | chance of top-1 {100 * chance[way].mean().item():.2f} %",
            )
            for way, ranks in found.items()
            for top in self.top
        ]

    def _classification(
        self, tokenizer: Any, bench: Bench, split: str, images: Tensor, rows: dict[str, Any], has: list[int]
    ) -> list[Reading]:
        dataset = bench.dataset(split)
        trained = bench.features(bench.splits[0])
        out = []
        for field in self.classes:
            if field not in dataset.names or field not in rows:
                continue
            labels = torch.tensor([rows[field][i] for i in has])
            for source, weights in self._classifiers(tokenizer, dataset.names[field], trained, field).items():
                known = weights.any(1)
                weights, places = weights[known], known.nonzero().flatten()
                hits = places[(images @ weights.T).argmax(1)] == labels
                protocol = f"{self._how(source, field, bench.splits[0])} | chance {100 / len(weights):.2f} %"
                out.append(
                    Reading(
                        f"zero_shot/{field}_by_{source}",
                        split,
                        hits.double().mean().item(),
                        len(hits),
                        protocol,
                    )
                )
        return out

    def _how(self, source: Literal["name", "captions"], field: str, trained: str) -> str:
        if source == "name":
            return f"nearest {field} by its name in the prompt {self.prompt!r}, hyphens as spaces, cosine"
        return f"nearest {field} by the mean embedding of its distinct captions in {trained}, cosine"

    def _classifiers(
        self, tokenizer: Any, names: Sequence[str], trained: dict[str, Any], field: str
    ) -> dict[Literal["name", "captions"], Tensor]:
        """(classes, E) by source; a class without any caption is a row of zeros."""
        prompts = [self.prompt.format(name.replace("-", " ").replace("_", " ")) for name in names]
        by_name = self._embed(tokenizer, prompts)
        pairs = sorted(
            {(text, c) for text, c in zip(trained["text"], trained[field], strict=True) if text is not None}
        )
        sums = torch.zeros_like(by_name)
        sums.index_add_(
            0, torch.tensor([c for _, c in pairs]), self._embed(tokenizer, [text for text, _ in pairs])
        )
        return {"name": by_name, "captions": F.normalize(sums, dim=1)}


def _export(tokenizer: Any, method: str, value: Any) -> Tensor:
    """Embeddings (n, E) by a method that the stack's objectives export."""
    try:
        found: Tensor = getattr(tokenizer, method)(value)
    except LookupError as error:
        raise LeftOut(str(error)) from error
    return found.float().cpu()


def _best_ranks(queries: Tensor, gallery: Tensor, of_query: Tensor, of_gallery: Tensor) -> Tensor:
    """Rank, from 0, of each query's nearest match in the gallery, (n,); a tie counts against it."""
    out = []
    for q, own in zip(queries.split(ROWS), of_query.split(ROWS), strict=True):
        scores = q @ gallery.T
        match = own[:, None] == of_gallery
        best = scores.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        out.append(((scores >= best) & ~match).sum(1))
    return torch.cat(out)
