"""A stack: the YAML that everything else follows from. Loading and checking it imports no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from vtp_core import options
from vtp_core.errors import DataFault, PluginFault, StackFault, suggestion
from vtp_plugins.registry import Registry

SECTIONS = {  # section -> group of its entries; each entry is an instance name with options
    "objectives": "objectives",
    "teachers": "teachers",
    "modules": "modules",
    "views": "views",
    "probes": "probes",
    "hooks": "hooks",
}
SINGLES = {"data": "datasets", "encoder": "encoders", "decoder": "decoders", "generator": "generators"}
KEYS = frozenset({"modality", "size", "bottleneck", "tokenizer", "train", "run", *SECTIONS, *SINGLES})
_MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Stack:
    """A checked stack.

    Attributes:
        name: of the file, without its suffix.
        config: the resolved tree of plain values.
        registry: what its names resolve through.
    """

    name: str
    config: dict[str, Any]
    registry: Registry = field(repr=False, compare=False)

    @property
    def dial(self) -> str:
        return str(self.config.get("size", "tiny"))

    @property
    def train(self) -> options.Train:
        node = dict(self.config.get("train") or {})
        node["optim"] = {**options.DIALS.get(self.dial, {}), **(node.get("optim") or {})}
        return options.Train.model_validate(node)

    @property
    def data(self) -> options.Data:
        node = self.config.get("data") or {}
        return options.Data.model_validate({k: v for k, v in node.items() if k in options.DATA_KEYS})

    @property
    def run(self) -> options.Run:
        return options.Run.model_validate(self.config.get("run") or {})

    def section(self, name: str) -> dict[str, dict[str, Any]]:
        """Entries of a section, each a dict of options."""
        return {key: dict(node or {}) for key, node in (self.config.get(name) or {}).items()}

    def yaml(self) -> str:
        """The resolved tree as YAML; loading it gives the same stack."""
        text: str = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        return text


def load_stack(source: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None) -> Stack:
    """Load a shipped stack by name, or a file by path; apply overrides; check keys and names.

    Args:
        source: ``vtp-tiny`` or ``./mine.yaml``.
        overrides: ``objectives.koleo.weight=0.1``; ``objectives.clip=null`` or ``~objectives.clip`` removes.
        registry: what is installed; made afresh by default.

    Raises:
        StackFault: no such stack, broken YAML, an unknown key, name or value.
    """
    registry = registry or Registry()
    path = find_stack(str(source), registry)
    config = _read(path)
    merged = _override(config, list(overrides))
    return check_stack(path.stem, merged, registry)


def load_run_stack(run: Path, registry: Registry, overrides: Iterable[str] = (), check: bool = True) -> Stack:
    """The stack of a run directory, under the name the run was started with.

    Without ``check`` its names need not be installed: a tokenizer loads without its objectives' plugins.

    Raises:
        DataFault: there is no run.
    """
    file = run / "stack.yaml"
    if not file.is_file():
        raise DataFault(f"{run} is no run directory: it has no stack.yaml; give a directory that vtp train wrote")
    record = run / "run.json"
    name = json.loads(record.read_text(encoding="utf-8")).get("name") if record.is_file() else None
    tree = _override(_read(file), list(overrides))
    if check and "***" in file.read_text(encoding="utf-8") and "***" in json.dumps(tree):
        raise StackFault(f"{file} has a masked secret (***); start from your own stack file, or override that key")
    return (check_stack if check else Stack)(str(name or run.name), tree, registry)


def find_stack(source: str, registry: Registry) -> Path:
    """The file behind a name or a path."""
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or path.exists():
        if path.is_dir():
            path = path / "stack.yaml"
        if not path.is_file():
            raise StackFault(f"no stack file {source}")
        return path
    entry = registry.find("stacks", source, "stack")
    package = importlib.util.find_spec(entry.target)
    places = list(package.submodule_search_locations or []) if package else []
    for place in places:
        if (Path(place) / f"{source}.yaml").is_file():
            return Path(place) / f"{source}.yaml"
    raise PluginFault(f"stacks {source!r}: package {entry.target} of {entry.distribution} has no {source}.yaml")


def _read(path: Path) -> DictConfig:
    _clear_resolvers()
    text = path.read_text(encoding="utf-8")
    if len(text) > _MAX_BYTES or "!!python" in text:
        raise StackFault(f"{path}: not a stack (over 1 MB, or a Python tag)")
    try:
        config = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise StackFault(f"{path}: {error}") from error
    if not isinstance(config, DictConfig):
        raise StackFault(f"{path}: a stack is a mapping of keys such as {', '.join(sorted(KEYS))}")
    return config


def _clear_resolvers() -> None:
    """Config strings must not import or run anything: only the environment and selection stay."""
    for name in ("oc.coerce", "oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values"):
        if OmegaConf.has_resolver(name):
            OmegaConf.clear_resolver(name)


def _override(config: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Merge ``key=value`` overrides and resolve interpolations; null entries disappear."""
    try:
        for item in overrides:
            key, equals, value = item.partition("=")
            if key.startswith("~") and not equals:
                key, equals, value = key[1:], "=", "null"
            if not equals:
                raise StackFault(f"override {item!r}: write key=value, or ~key to remove")
            if key.rpartition(".")[2] == "use":
                _drop_options(config, key.rpartition(".")[0])
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise StackFault(f"stack: {str(error).splitlines()[0]}") from error
    assert isinstance(tree, dict)
    return _without_nulls(tree)


def _drop_options(config: DictConfig, key: str) -> None:
    """Another component has other options; the engine's keys stay."""
    node = OmegaConf.select(config, key) if key else None
    if isinstance(node, DictConfig):
        keep = options.OBJECTIVE_KEYS | options.DATA_KEYS | options.PROBE_KEYS | options.COMPONENT_KEYS
        for option in [o for o in node if o not in keep]:
            del node[option]


def _without_nulls(tree: dict[Any, Any]) -> dict[str, Any]:
    """Drop sections, entries and components set to null; an option set to null keeps its null."""
    kept: dict[str, Any] = {}
    for key, node in tree.items():
        if node is None:
            continue
        if key in SECTIONS and isinstance(node, dict):
            node = {name: entry for name, entry in node.items() if entry is not None}
        kept[str(key)] = node
    return kept


def check_stack(name: str, config: Mapping[str, Any], registry: Registry) -> Stack:
    """Check keys, engine values and names of a resolved tree; no component is imported."""
    for key in config:
        if key not in KEYS:
            raise StackFault(f"unknown key {key!r} in the stack{suggestion(str(key), KEYS)}")
    stack = Stack(name, dict(config), registry)
    if "tokenizer" not in config and "encoder" not in config:
        raise StackFault("the stack names neither an encoder nor a tokenizer; write encoder: {use: vit}")
    _check_options(stack)
    _check_names(stack)
    return stack


def _check_options(stack: Stack) -> None:
    train = dict(stack.config.get("train") or {})
    optim = train.get("optim") or {}
    _validated(options.Train, "train", {**train, "optim": {**options.DIALS.get(stack.dial, {}), **optim}})
    _validated(options.Run, "run", stack.config.get("run") or {})
    if stack.dial not in options.DIALS:
        raise StackFault(f"size: no dial {stack.dial!r}{suggestion(stack.dial, options.DIALS)}")
    for section, model, keys in (
        ("objectives", options.Objective, options.OBJECTIVE_KEYS - {"optim"}),
        ("probes", options.Probe, options.PROBE_KEYS),
    ):
        for name, node in _nodes(stack, section):
            _validated(model, f"{section}.{name}", {k: v for k, v in node.items() if k in keys})
    for key, node in [*_nodes(stack, "objectives"), *((k, stack.config.get(k) or {}) for k in SINGLES)]:
        if isinstance(node, Mapping) and "optim" in node:
            base = stack.train.optim.model_dump()
            _validated(options.Optim, f"{key}.optim", {**base, **node["optim"]})
    data = stack.config.get("data") or {}
    _validated(options.Data, "data", {k: v for k, v in data.items() if k in options.DATA_KEYS})


def _nodes(stack: Stack, section: str) -> list[tuple[str, Mapping[str, Any]]]:
    entries = stack.config.get(section) or {}
    if not isinstance(entries, Mapping):
        raise StackFault(f"{section}: a mapping of name to options is wanted, not {type(entries).__name__}")
    for name, node in entries.items():
        if not isinstance(node, Mapping):
            raise StackFault(f"{section}.{name}: options are a mapping, write {{}} for none, not {node!r}")
    return list(entries.items())


def _validated(model: type[BaseModel], key: str, node: Any) -> None:
    try:
        model.model_validate(node)
    except ValidationError as error:
        raise StackFault("\n".join(_line(model, key, fault) for fault in error.errors())) from error


def _line(model: type[BaseModel], key: str, fault: Any) -> str:
    place = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        inner: Any = model
        for part in place[:-1]:
            inner = inner.model_fields[part].annotation if hasattr(inner, "model_fields") else None
        known = getattr(inner, "model_fields", {})
        return f"{'.'.join([key, *place[:-1]])}: unknown key {place[-1]!r}{suggestion(place[-1], known)}"
    return f"{'.'.join([key, *place])}: {fault['msg']}, got {fault['input']!r}"


def _check_names(stack: Stack) -> None:
    find = stack.registry.find
    find("modalities", stack.config.get("modality", "image"), "modality")
    for key, kind in SINGLES.items():
        node = stack.config.get(key)
        if isinstance(node, Mapping) and "from" not in node and "share" not in node:
            if "use" not in node:
                raise StackFault(f"{key}: 'use' is missing{suggestion('', stack.registry.names(kind))}")
            find(kind, node["use"], f"{key}.use")
        elif node is not None and not isinstance(node, Mapping):
            raise StackFault(f"{key}: options are a mapping such as {{use: NAME}}, not {node!r}")
    for index, link in enumerate(links_of(stack.config)):
        find("bottlenecks", link.get("use", ""), f"bottleneck[{index}].use")
    for section, kind in SECTIONS.items():
        for name, node in _nodes(stack, section):
            find(kind, node.get("use", name), f"{section}.{name}")
    for name in stack.train.trackers:
        find("hooks", name, "train.trackers")


def links_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The bottleneck's chain: one component, or a list applied in order."""
    node = config.get("bottleneck")
    if node is None:
        return []
    nodes = node if isinstance(node, list) else [node]
    for link in nodes:
        if not isinstance(link, Mapping):
            raise StackFault(f"bottleneck: a component such as {{use: linear, channels: 16}}, not {link!r}")
    return [dict(link) for link in nodes]
