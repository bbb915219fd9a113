"""A stack's file and the ``key=value`` of a command line, merged into a tree of plain values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vtp_core import options
from vtp_core.errors import StackFault, suggestion

ENTRIES = frozenset({"objectives", "teachers", "modules", "views", "probes", "hooks"})
"""Sections whose entries are removed by ``section.name=null``."""
_MAX_BYTES = 1_000_000
_RESOLVERS = ("oc.env", "oc.select")
_BROKEN = (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError, IndexError)


def read(path: Path) -> DictConfig:
    """A stack's file, its interpolations not resolved yet.

    Raises:
        StackFault: it is no YAML mapping, too large, or uses a tag.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise StackFault(f"{path}: not a stack, it is larger than {_MAX_BYTES:,} bytes")
        config = _parsed(raw.decode("utf-8"))
    except (OSError, *_BROKEN) as error:
        if isinstance(error, StackFault):
            raise
        raise StackFault(f"{path}: {_reason(error)}") from error
    if not isinstance(config, DictConfig):
        raise StackFault(f"{path}: a stack is a mapping of keys such as data, encoder, objectives, train")
    return config


def merged(config: DictConfig, overrides: Iterable[str]) -> dict[Any, Any]:
    """The tree with overrides applied and interpolations resolved; ``config`` is changed.

    A new ``use`` comes first, so that options for the new component may stand anywhere.

    Raises:
        StackFault: an override that cannot be read or removes what is not there, or an interpolation
            that does not resolve.
    """
    for item in sorted(overrides, key=lambda item: not item.partition("=")[0].endswith(".use")):
        try:
            _apply(config, item)
        except _BROKEN as error:
            if isinstance(error, StackFault):
                raise
            raise StackFault(f"override {item!r}: {_reason(error)}") from error
    _clear_resolvers()
    try:
        tree = OmegaConf.to_container(config, resolve=True)
    except _BROKEN as error:
        raise StackFault(f"stack: {_reason(error)}") from error
    assert isinstance(tree, dict)
    return {key: _entries(node) if key in ENTRIES else node for key, node in tree.items()}


def _entries(node: Any) -> Any:
    """A section without the entries that are null."""
    return {name: entry for name, entry in node.items() if entry is not None} if isinstance(node, dict) else node


def _parsed(text: str) -> Any:
    """YAML without tags: a stack is plain values."""
    if "!" in text:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "tag", None) is not None:
                line = event.start_mark.line + 1
                raise StackFault(f"line {line}: tag {event.tag!r}; a stack holds plain values only")
    return OmegaConf.create(text)


def _clear_resolvers() -> None:
    """Config strings must not import or run anything: only the environment and selection stay."""
    kept: dict[str, Callable[..., Any]] = {}
    OmegaConf.clear_resolvers()  # those of other libraries; the defaults come back
    for name in ("oc.coerce", "oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values"):
        OmegaConf.clear_resolver(name)
    del kept


def _reason(error: BaseException) -> str:
    """The first lines of a library's message."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(line.strip() for line in str(error).splitlines()[:4])


# ---- one override


def _apply(config: DictConfig, item: str) -> None:
    key, equals, text = item.partition("=")
    if key.startswith("~") and not equals:
        _remove(config, key[1:], item)
        return
    if not equals or not key.strip("~"):
        raise StackFault(f"override {item!r}: write key=value, or ~key to remove")
    value = OmegaConf.to_container(_parsed_value(text), resolve=False)["value"]
    parts = _parts(key)
    if value is None and len(parts) == 2 and parts[0] in ENTRIES:
        _remove(config, key, item)
        return
    if parts[-1] == "use":
        _drop_options(config, parts[:-1], value)
    elif isinstance(value, dict) and "use" in value:
        _drop_options(config, parts, value["use"])
    OmegaConf.update(config, key, value, merge=True)


def _parsed_value(text: str) -> DictConfig:
    if "!" in text:
        _parsed(text)
    return OmegaConf.from_dotlist([f"value={text}"])


def _parts(key: str) -> list[str]:
    """``bottleneck[0].channels`` -> bottleneck, 0, channels."""
    return re.findall(r"[^.\[\]]+", key)


def _at(config: Any, parts: list[str]) -> Any:
    """What lies below a node; None where nothing does."""
    for part in parts:
        if isinstance(config, ListConfig) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, DictConfig) and part in config:
            config = config[part]
        else:
            return None
    return config


def _remove(config: DictConfig, key: str, item: str) -> None:
    """Delete a key; a misspelt removal would train what was to be left out, so it must be there."""
    parts = _parts(key)
    parent = _at(config, parts[:-1]) if parts else None
    if isinstance(parent, ListConfig) and parts[-1].isdigit() and int(parts[-1]) < len(parent):
        del parent[int(parts[-1])]
    elif isinstance(parent, DictConfig) and parts[-1] in parent:
        del parent[parts[-1]]
    else:
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        raise StackFault(f"override {item!r}: there is no {key!r} to remove{suggestion(parts[-1] if parts else '', known)}")


def _drop_options(config: DictConfig, parts: list[str], name: Any) -> None:
    """Another component has other options; the engine's keys stay."""
    node = _at(config, parts)
    if not isinstance(node, DictConfig) or node.get("use", parts[-1]) == name:
        return
    own = {
        "objectives": options.OBJECTIVE_KEYS,
        "probes": options.PROBE_KEYS,
        "data": options.DATA_KEYS,
        "generator": options.GENERATOR_KEYS,
    }
    keep = options.COMPONENT_KEYS | own.get(parts[0], frozenset())
    for option in [option for option in node if option not in keep]:
        del node[option]
