"""Values of a stack against a pydantic model; what is wrong becomes lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from vtp_core.errors import StackFault, suggestion

M = TypeVar("M", bound=BaseModel)
Place = tuple[str, ...]


def validated(model: type[M], key: str, node: Any) -> M:
    """``node`` as a ``model``.

    Args:
        model: what is wanted.
        key: place of the node in the stack, ``objectives.dino``.
        node: what the stack says there.

    Raises:
        StackFault: one line for every key at fault.
    """
    try:
        return model.model_validate(node)
    except ValidationError as error:
        raise StackFault("\n".join(_lines(error, model, key, node))) from error


def _lines(error: ValidationError, model: type[BaseModel], key: str, node: Any) -> list[str]:
    """One line for a key, however many members of a union its value fails."""
    wanted: dict[Place, list[str]] = {}
    given: dict[Place, str] = {}
    for fault in error.errors():
        place, last = _place(fault["loc"], node), str(fault["loc"][-1]) if fault["loc"] else ""
        message, got = fault["msg"].removeprefix("Value error, "), f", got {fault['input']!r}"
        if fault["type"] == "extra_forbidden":
            message, got = f"unknown key{suggestion(last, _keys(model, place[:-1]))}", ""
        elif fault["type"] == "missing":
            place, message, got = (*place, last), "is missing", ""
        wanted.setdefault(place, []).append(message)
        given[place] = got
    deepest = [place for place in wanted if not any(_inside(other, place) for other in wanted)]
    return [
        f"{'.'.join((key, *place))}: {', or '.join(dict.fromkeys(wanted[place]))}{given[place]}"
        for place in deepest
    ]


def _place(loc: tuple[int | str, ...], node: Any) -> Place:
    """The keys among pydantic's location, which also names the members of unions."""
    place: list[str] = []
    for part in loc:
        among = (
            node if isinstance(node, Mapping) else range(len(node) if isinstance(node, list | tuple) else 0)
        )
        if part in among:
            node = node[part]
            place.append(str(part))
    return tuple(place)


def _inside(inner: Place, outer: Place) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _keys(model: Any, place: Place) -> list[str]:
    """Keys that are known at a place below a model."""
    for part in place:
        field = getattr(model, "model_fields", {}).get(part)
        members = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        model = next((m for m in members if hasattr(m, "model_fields")), None)
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]
