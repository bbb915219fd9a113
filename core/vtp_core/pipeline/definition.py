"""What a pipeline's YAML says: its stages and what they refer to, before any stack is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vtp_core.errors import StackFault, suggestion
from vtp_core.overrides import merged, read
from vtp_core.pipeline import FILE
from vtp_core.stack import KEYS as STACK_KEYS
from vtp_core.stack import find_stack
from vtp_core.validation import validated
from vtp_plugins.registry import Registry

KEYS = frozenset({"name", "stages", "run"})
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_RESERVED = "run"  # run.dir=DIR is an override of the pipeline itself


def _items(value: Any) -> Any:
    """``with`` as overrides: a mapping of keys, or items as on the command line."""
    if isinstance(value, Mapping):
        return [f"{key}={json.dumps(entry, ensure_ascii=False)}" for key, entry in value.items()]
    return value


class Node(BaseModel):
    """One stage as written: of a stack, or of latents."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    stack: str | dict[str, Any] | None = None
    latents: dict[str, Any] | None = None
    tokenizer: str | None = None
    data: str | None = None
    changes: Annotated[list[str], BeforeValidator(_items)] = Field([], alias="with")
    name: str | None = Field(None, pattern=r"^[^/]{1,200}$")  # of a stack that is written out


@dataclass(frozen=True, slots=True)
class Definition:
    """A pipeline as written, with overrides dealt to its stages.

    Attributes:
        name: of the file, without its suffix and what a directory's name had better not have.
        folder: the pipeline directory that ``run.dir`` asks for.
        beside: where a stage's relative path may lie besides the working directory.
        stages: by name, in order.
    """

    name: str
    folder: Path | None
    beside: Path
    stages: dict[str, Node]


def read_pipeline(source: str | Path, overrides: Iterable[str], registry: Registry) -> Definition:
    """Read a pipeline and check its keys and references.

    Args:
        source: a shipped name, a YAML file or a pipeline directory.
        overrides: ``stage.key=value`` and ``run.dir=DIR``.
        registry: what is installed.

    Raises:
        StackFault: no such pipeline, an unknown key, or a reference to no earlier stage.
    """
    path = Path(source) / FILE
    path = path if path.is_file() else find_stack(str(source), registry)
    tree = merged(read(path), ())
    _check_keys(source, tree)
    stages = {name: _node(str(name), node) for name, node in tree["stages"].items()}
    own, dealt = _dealt(overrides, stages)
    stages = {n: s.model_copy(update={"changes": [*s.changes, *dealt[n]]}) for n, s in stages.items()}
    _check_references(stages)
    where = _directory([*_items(tree.get("run") or {}), *own])
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", str(tree.get("name") or path.stem)).strip(".-")
    return Definition(label or "pipeline", where, path.parent, stages)


def _check_keys(source: str | Path, tree: Mapping[Any, Any]) -> None:
    if "stages" not in tree and STACK_KEYS & set(tree):
        raise StackFault(f"{source} is a stack, not a pipeline; vtp train {source}")
    for key in tree:
        if key not in KEYS:
            raise StackFault(f"unknown key {key!r} in the pipeline{suggestion(str(key), KEYS)}")
    if not isinstance(tree.get("stages"), dict) or not tree["stages"]:
        raise StackFault("stages: a mapping of stages is wanted, such as tokenizer: {stack: vtp-tiny}")
    run = tree.get("run") or {}
    if not isinstance(run, dict):
        raise StackFault(f"run: a mapping is wanted, such as {{dir: runs/mine}}, not {run!r}")


def _node(name: str, node: Any) -> Node:
    key = f"stages.{name}"
    if not _NAME.fullmatch(name) or name == _RESERVED:
        raise StackFault(f"{key}: no name of a stage; small letters, digits, - and _ are, and not 'run'")
    if not isinstance(node, dict):
        raise StackFault(f"{key}: a mapping is wanted, such as {{stack: vtp-tiny}}, not {node!r}")
    found = validated(Node, key, node)
    if (found.stack is None) == (found.latents is None):
        raise StackFault(f"{key}: one of stack: NAME and latents: {{}} is wanted")
    if found.latents is not None and (found.data or not found.tokenizer):
        raise StackFault(f"{key}: latents are written with a tokenizer: STAGE, and without data")
    if found.name is not None and not isinstance(found.stack, dict):
        raise StackFault(f"{key}.name: it names a stack that is written out; {found.stack!r} has a name")
    return found


def _dealt(overrides: Iterable[str], stages: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of the pipeline itself, and those of each stage without its name."""
    own: list[str] = []
    dealt: dict[str, list[str]] = {name: [] for name in stages}
    for item in overrides:
        tilde, rest = ("~", item[1:]) if item.startswith("~") else ("", item)
        name, dot, change = rest.partition(".")
        if not dot or "=" in name:
            raise StackFault(f"override {item!r}: write stage.key=value{suggestion(name, dealt)}")
        if name == _RESERVED:
            own.append(change)
        elif name not in dealt:
            raise StackFault(f"override {item!r}: there is no stage {name!r}{suggestion(name, dealt)}")
        elif change.startswith("run."):
            raise StackFault(f"override {item!r}: stages live in the pipeline's directory, run.dir=DIR")
        else:
            dealt[name].append(tilde + change)
    return own, dealt


def _directory(items: Iterable[str]) -> Path | None:
    """The value of ``dir`` among overrides of ``run``; the last one holds."""
    found = None
    for item in items:
        key, _, value = item.partition("=")
        if key != "dir":
            raise StackFault(f"run: unknown key {key!r}{suggestion(key, ['dir'])}")
        found = value.strip('"') or None
    return None if found in (None, "null") else Path(str(found))


def _check_references(stages: Mapping[str, Node]) -> None:
    """A stage refers to earlier ones: ``tokenizer`` to one of a stack, ``data`` to one of latents."""
    earlier: list[str] = []
    for name, stage in stages.items():
        for role, wants_latents in (("tokenizer", False), ("data", True)):
            target = getattr(stage, role)
            if target is None:
                continue
            fit = [n for n in earlier if (stages[n].latents is not None) == wants_latents]
            if target not in fit:
                why = _why(target, stages, earlier, "latents" if wants_latents else "a stack")
                raise StackFault(f"stages.{name}.{role}: {why}{suggestion(target, fit)}")
        earlier.append(name)


def _why(target: str, stages: Mapping[str, Node], earlier: list[str], kind: str) -> str:
    if target not in stages:
        return f"there is no stage {target!r}"
    return f"{target!r} is no stage of {kind}" if target in earlier else f"{target!r} is no earlier stage"
