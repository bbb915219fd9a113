"""A stack's file and the ``key=value`` of a command line, merged into a tree of plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable
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
_ALLOWED = re.compile(r"\$\{(?:\s*oc\.(?:env|select)\s*:|[^:{}$]*\})")
_BROKEN = (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, TypeError, IndexError)


def read(path: Path) -> DictConfig:
    """A stack's file, its interpolations not resolved yet.

    Raises:
        StackFault: it is no YAML mapping, too large, or uses a tag.
    """
    try:
        raw = path.read_bytes()
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"not a stack, it is larger than {_MAX_BYTES:,} bytes")
        text = raw.decode("utf-8")
        _check_tags(text)
        tree = _words(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
        _check_interpolations(tree)
        config = OmegaConf.create(tree)
    except (OSError, *_BROKEN) as error:
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
            raise StackFault(f"override {item!r}: {_reason(error)}") from error
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except _BROKEN as error:
        raise StackFault(f"stack: {_reason(error)}") from error
    assert isinstance(tree, dict)
    return {key: _entries(node) if key in ENTRIES else node for key, node in tree.items()}


def _entries(node: Any) -> Any:
    """A section without the entries that are null."""
    return (
        {name: entry for name, entry in node.items() if entry is not None} if isinstance(node, dict) else node
    )


def _words(node: Any) -> Any:
    """The tree with keys as words: YAML 1.1 reads a bare ``on:`` as true."""
    if isinstance(node, dict):
        return {"on" if key is True else "off" if key is False else key: _words(v) for key, v in node.items()}
    return [_words(child) for child in node] if isinstance(node, list) else node


def _check_tags(text: str) -> None:
    """YAML without tags: a stack is plain values, and some tags make objects."""
    if "!" in text:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "tag", None) is not None:
                raise ValueError(
                    f"tag {event.tag!r} in line {event.start_mark.line + 1}; a stack holds plain values"
                )


def _check_interpolations(node: Any) -> None:
    """A config string must not import or run anything: of resolvers, only the environment and selection work.

    Refusing the others here, and not clearing them, leaves other users of OmegaConf in this process alone.
    """
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            _check_interpolations(child)
    elif isinstance(node, str):
        for start in re.finditer(r"\$\{", node):
            if not _ALLOWED.match(node, start.start()):
                raise ValueError(
                    f"{node!r}: what can be read is ${{key}}, ${{oc.env:NAME}}, "
                    "${oc.env:NAME,default} and ${oc.select:key,default}"
                )


def _reason(error: BaseException) -> str:
    """The first lines of a library's message."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(line.strip() for line in str(error).splitlines()[:4])


# ---- one override


def _apply(config: DictConfig, item: str) -> None:
    key, equals, text = item.partition("=")
    removes = key.startswith("~") and not equals
    parts = _parts(key.removeprefix("~") if removes else key)
    if not parts or not (equals or removes):
        raise ValueError("write key=value, or ~key to remove")
    value = None if removes else _value(text)
    if removes or (value is None and len(parts) == 2 and parts[0] in ENTRIES):
        _remove(config, parts)
        return
    if parts[-1] == "use":
        _drop_options(config, parts[:-1], value)
    elif isinstance(value, dict) and "use" in value:
        _drop_options(config, parts, value["use"])
    merge = isinstance(value, dict) and isinstance(_at(config, parts), DictConfig)
    OmegaConf.update(config, key, value, merge=merge)


def _value(text: str) -> Any:
    """The right side of an override, its interpolations not resolved yet."""
    _check_tags(text)
    tree = _words(OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False))
    _check_interpolations(tree)
    assert isinstance(tree, dict)
    return tree["value"]


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


def _remove(config: DictConfig, parts: list[str]) -> None:
    """Delete a key. It must be there: a misspelt removal would train what was to be left out."""
    parent, last = _at(config, parts[:-1]), parts[-1]
    if _at(parent, [last]) is None and not (isinstance(parent, DictConfig) and last in parent):
        known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        raise ValueError(f"there is no {last!r} to remove{suggestion(last, known)}")
    del parent[int(last) if isinstance(parent, ListConfig) else last]


def _drop_options(config: DictConfig, parts: list[str], name: Any) -> None:
    """Another component has other options; the engine's keys stay."""
    node = _at(config, parts)
    if not _is_component(parts) or not isinstance(node, DictConfig) or node.get("use", parts[-1]) == name:
        return
    own = {
        "objectives": options.OBJECTIVE_KEYS,
        "probes": options.PROBE_KEYS,
        "data": options.DATA_KEYS,
        "generator": options.GENERATOR_KEYS,
        "sampler": options.SAMPLER_KEYS,
    }
    keep = options.COMPONENT_KEYS | own.get(parts[0], frozenset())
    for option in [option for option in node if option not in keep]:
        del node[option]


def _is_component(parts: list[str]) -> bool:
    """Whether ``use`` names a component here; in ``train.optim`` or ``sampler.guidance`` it is a key like any other."""
    if len(parts) == 2:
        return parts[0] in {*ENTRIES, "bottleneck"} or parts == ["generator", "path"]
    return len(parts) == 1
