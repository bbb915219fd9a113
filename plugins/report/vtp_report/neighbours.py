"""Nearest neighbours by CLS: questions from an unseen split, answers from the trained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_report.matches import Hit, Ranking, Relation
from vtp_report.pictures import picture
from vtp_report.samples import caption, chosen, gather, query_split

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Rankings and where they come from; ``across`` is the field that differs between the splits."""

    query: str
    base: str
    across_styles: bool
    relation: Relation
    rankings: list[Ranking]


def neighbours(bench: Bench, samples: int, depth: int, seed: int) -> Neighbours:
    """The ``depth`` nearest of the first split for some samples of the second."""
    query, base = query_split(bench), bench.splits[0]
    asked, known = bench.features(query), bench.features(base)
    relation = _relation(asked, known)
    indices = chosen(samples, len(asked["cls"]), seed, "neighbours")
    cosines = _unit(asked["cls"][indices]) @ _unit(known["cls"]).T  # (Q, n)
    if query == base:
        cosines[range(len(indices)), indices] = -1.0  # a sample is no neighbour of itself
    values, places = cosines.topk(min(depth, cosines.shape[1]))
    questions = gather(bench, query, indices)
    answers = gather(bench, base, places.flatten().tolist())
    rankings = []
    for row, index in enumerate(indices):
        hits = [
            Hit(
                picture=picture(answers[place], caption(known.get("text"), place)),
                text=caption(known.get("text"), place),
                cosine=float(value),
                match=relation.match(asked, index, known, place),
            )
            for place, value in zip(places[row].tolist(), values[row].tolist(), strict=True)
        ]
        text = caption(asked.get("text"), index)
        rankings.append(Ranking(picture(questions[index], text), text, hits))
    return Neighbours(query, base, "style" in asked, relation, rankings)


def _relation(asked: Mapping[str, Any], known: Mapping[str, Any]) -> Relation:
    return Relation.of(
        {name: [*asked[name], *known[name]] for name in FIELDS if name in asked and name in known}
    )


def _unit(x: Tensor) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(x.float().cpu(), dim=-1)


FIELDS = ("concept", "text", "label")
