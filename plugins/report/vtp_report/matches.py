"""Ranked lists and the frames that say what is right in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vtp_report.pictures import Picture

Match = Literal["same", "kin", "other"]


@dataclass(frozen=True, slots=True)
class Hit:
    """One place of a ranked list: a picture (absent in lists of captions), its words, cosine and match."""

    picture: Picture | None
    text: str
    cosine: float
    match: Match


@dataclass(frozen=True, slots=True)
class Ranking:
    """A question (a picture or a caption) and its best answers, best first."""

    picture: Picture | None
    text: str
    hits: list[Hit]


@dataclass(frozen=True, slots=True)
class Relation:
    """When two samples are the same and when they are kin, by the names of raw fields.

    Attributes:
        same: field whose equality is the same thing; empty where the data knows none.
        kin: field whose equality is the same sub-category; empty where ``same`` is all there is.
    """

    same: str
    kin: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Relation:
        """The finest relation that the fields allow: ``concept`` over ``text`` over ``label``."""
        known = [name for name in ("concept", "text", "label") if _is_known(fields.get(name))]
        same = known[0] if known else ""
        return cls(same=same, kin="label" if same != "label" and "label" in known else "")

    def match(self, a: Mapping[str, Any], i: int, b: Mapping[str, Any], j: int) -> Match:
        """How sample i of fields ``a`` and sample j of fields ``b`` are related."""
        if self.same and a[self.same][i] == b[self.same][j]:
            return "same"
        if self.kin and a[self.kin][i] == b[self.kin][j]:
            return "kin"
        return "other"


def _is_known(values: Sequence[Any] | None) -> bool:
    return bool(values) and all(value is not None for value in values or ())
