"""What the command line tells an importer, checked against the annotations of its ``convert``."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vtp_core.errors import PluginFault, StackFault, suggestion
from vtp_core.validation import validated


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the importer, ``heads=4``, and overrides of the stack, ``sampler.steps=50``."""
    keys = [word.lstrip("~").partition("=")[0] for word in words]
    own = [word for word, key in zip(words, keys, strict=True) if not {".", "["} & set(key)]
    return own, [word for word in words if word not in own]


def options_of(
    importer: Any, name: str, words: Sequence[str], settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keyword arguments for an importer's ``convert``.

    Args:
        importer: whose they are.
        name: of the importer.
        words: ``key=value``.
        settings: what a file's own configuration says, likewise.

    Raises:
        StackFault: an option that it doesn't take, or a value of the wrong type.
        PluginFault: the importer breaks the contract.
    """
    schema = _schema(importer, name)
    given: dict[str, Any] = dict(settings or {})
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or key not in schema.model_fields:
            known = suggestion(key, schema.model_fields)
            raise StackFault(f"{word!r}: {name} has no option {key!r}{known}; keys of the stack have a dot")
        try:
            tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False)
        except (OmegaConfBaseException, ValueError) as error:
            raise StackFault(f"{word!r}: {error}") from error
        given |= tree
    checked = validated(schema, name, given)
    return {key: getattr(checked, key) for key in given}


def _schema(importer: Any, name: str) -> type[pydantic.BaseModel]:
    convert = getattr(importer, "convert", None)
    if not callable(convert):
        raise PluginFault(f"importers {name!r} has no method convert; see vtp_plugins.importing.Importer")
    taken = [p for p in inspect.signature(convert).parameters.values() if p.kind is p.KEYWORD_ONLY]
    function: Any = getattr(convert, "__func__", convert)
    written = {p.name: function.__annotations__.get(p.name, Any) for p in taken}
    try:
        hints = typing.get_type_hints(
            types.SimpleNamespace(__annotations__=written), function.__globals__, include_extras=True
        )
    except (NameError, TypeError) as error:
        raise PluginFault(
            f"importers {name!r}: {error}; annotations must be importable at run time"
        ) from error
    fields: dict[str, Any] = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in taken
    }
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    model: type[pydantic.BaseModel] = pydantic.create_model("Options", __config__=config, **fields)
    return model
