"""Captions find pictures and pictures find captions, without a trained classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_report.matches import Hit, Ranking, Relation
from vtp_report.pictures import picture
from vtp_report.record import AbsentError
from vtp_report.samples import caption, chosen, gather, query_split

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench

MOST = 2048  # pictures and captions ranked; the probe, not this page, measures all of a large split


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Both directions over ``images`` pictures and ``captions`` different captions of ``split``."""

    split: str
    images: int
    captions: int
    relation: Relation
    to_images: list[Ranking]
    to_captions: list[Ranking]


@dataclass(frozen=True, slots=True)
class _Scores:
    """Cosines (n, t) of pictures and captions; ``owners``: the picture that each caption was read from."""

    cosines: Tensor
    fields: dict[str, Any]
    owners: list[int]
    relation: Relation


def zero_shot(tokenizer: Any, bench: Bench, samples: int, depth: int, seed: int) -> ZeroShot:
    """Rankings for ``samples`` captions and as many pictures.

    Raises:
        AbsentError: the data has no captions, or the run trained no text tower.
    """
    split = query_split(bench)
    try:
        scores = _scores(tokenizer, bench, split)
    except LookupError as missing:
        raise AbsentError(str(missing)) from missing
    rows, columns = scores.cosines.shape
    return ZeroShot(
        split=split,
        images=rows,
        captions=columns,
        relation=scores.relation,
        to_images=_to_images(bench, split, scores, chosen(samples, columns, seed, "captions"), depth),
        to_captions=_to_captions(bench, split, scores, chosen(samples, rows, seed, "images"), depth),
    )


def _scores(tokenizer: Any, bench: Bench, split: str) -> _Scores:
    import torch

    fields = bench.features(split)
    texts: list[str | None] = fields.get("text", [])[:MOST]
    first = {text: index for index, text in reversed(list(enumerate(texts))) if text}
    owners = sorted(first.values())
    if not owners:
        raise AbsentError(f"split {split} has no captions")
    words = [str(texts[index]) for index in owners]
    text = torch.cat([tokenizer.embed_text(words[at : at + 256]).cpu() for at in range(0, len(words), 256)])
    images, seen = [], 0
    for batch in bench.images(split):
        images.append(tokenizer.embed_image(batch[: MOST - seen].to(bench.device)).cpu())
        seen += len(images[-1])
        if seen >= MOST:
            break
    cosines = torch.cat(images).float() @ text.float().T  # (n, E) x (E, t) -> (n, t)
    kin = "label" if Relation.of({"label": fields.get("label")}).same else ""
    return _Scores(cosines, fields, owners, Relation("text", kin))


def _to_images(bench: Bench, split: str, scores: _Scores, columns: list[int], depth: int) -> list[Ranking]:
    values, places = scores.cosines[:, columns].T.topk(min(depth, len(scores.cosines)))  # (q, depth)
    shown = gather(bench, split, places.flatten().tolist())
    texts = scores.fields["text"]
    rankings = []
    for row, column in enumerate(columns):
        owner = scores.owners[column]
        hits = [
            Hit(
                picture=picture(shown[place], caption(texts, place)),
                text=caption(texts, place),
                cosine=value,
                match=scores.relation.match(scores.fields, owner, scores.fields, place),
            )
            for place, value in zip(places[row].tolist(), values[row].tolist(), strict=True)
        ]
        rankings.append(Ranking(None, texts[owner], hits))
    return rankings


def _to_captions(bench: Bench, split: str, scores: _Scores, rows: list[int], depth: int) -> list[Ranking]:
    values, places = scores.cosines[rows].topk(min(depth, len(scores.owners)))  # (q, depth)
    shown = gather(bench, split, rows)
    texts = scores.fields["text"]
    rankings = []
    for row, index in enumerate(rows):
        hits = []
        for column, value in zip(places[row].tolist(), values[row].tolist(), strict=True):
            owner = scores.owners[column]
            match = scores.relation.match(scores.fields, index, scores.fields, owner)
            hits.append(Hit(None, texts[owner], value, match))
        text = caption(texts, index)
        rankings.append(Ranking(picture(shown[index], text), text, hits))
    return rankings
