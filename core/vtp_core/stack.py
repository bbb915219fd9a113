"""A stack: the YAML that everything else follows from. Loading and checking it imports no torch."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vtp_core import options
from vtp_core.errors import DataFault, PluginFault, StackFault, suggestion
from vtp_core.export.foreign_config import autoencoder_tree, is_autoencoder, is_onnx
from vtp_core.official.config import is_official
from vtp_core.official.stacks import official_tree
from vtp_core.overrides import ENTRIES, merged, read
from vtp_core.validation import M, validated
from vtp_plugins.registry import Registry

SINGLES = {
    "data": "datasets", "encoder": "encoders", "decoder": "decoders", "generator": "generators",
    "sampler": "samplers",
}  # fmt: skip
"""Key of one component -> its group in the registry."""
KEYS = frozenset({"modality", "size", "bottleneck", "tokenizer", "train", "run", *ENTRIES, *SINGLES})
_INSTANCE = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TAKEN = frozenset({"encoder", "bottleneck", "decoder", "generator", "weight", "lr", "grad", "time"})
"""Names that an objective cannot have: modules own parameters under them, and metrics begin with them."""


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
        node = _mapping("train", self.config.get("train"))
        optim = _mapping("train.optim", node.get("optim"))
        dial = options.DIALS.get(self.dial, {})
        return validated(options.Train, "train", {**node, "optim": {**dial, **optim}})

    @property
    def data(self) -> options.Data:
        return _engine_keys(options.Data, "data", self.config.get("data"))

    @property
    def tokenizer(self) -> options.Tokenizer:
        return validated(options.Tokenizer, "tokenizer", _mapping("tokenizer", self.config.get("tokenizer")))

    @property
    def generator(self) -> options.Generator:
        return _engine_keys(options.Generator, "generator", self.config.get("generator"))

    @property
    def sampler(self) -> options.Sampler:
        return _engine_keys(options.Sampler, "sampler", self.config.get("sampler"))

    @property
    def run(self) -> options.Run:
        return validated(options.Run, "run", _mapping("run", self.config.get("run")))

    def section(self, name: str) -> dict[str, dict[str, Any]]:
        """Entries of a section, each a dict of options."""
        return {key: dict(node or {}) for key, node in (self.config.get(name) or {}).items()}

    def yaml(self) -> str:
        """The resolved tree as YAML; loading it gives the same stack."""
        return str(OmegaConf.to_yaml(OmegaConf.create(self.config)))


def load_stack(source: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None) -> Stack:
    """Load a shipped stack by name, or a file by path; apply overrides; check keys and names.

    Args:
        source: ``vtp-tiny``, ``./mine.yaml``, or a run directory, whose stack it is.
        overrides: ``objectives.koleo.weight=0.1``; ``objectives.clip=null`` or ``~objectives.clip`` removes.
        registry: what is installed; made afresh by default.

    Raises:
        StackFault: no such stack, broken YAML, an unknown key, name or value.
    """
    registry = registry or Registry()
    path = find_stack(str(source), registry)
    if path.parent == Path(source):
        return load_run_stack(path.parent, registry, overrides)
    from vtp_core.inheriting import inherited, replaced  # which read stacks themselves

    overrides = list(overrides)
    config = replaced(read(path), overrides, registry)
    return check_stack(path.stem, inherited(merged(config, overrides), registry), registry)


def load_run_stack(run: Path, registry: Registry, overrides: Iterable[str] = (), check: bool = True) -> Stack:
    """The stack of a run directory, under the name the run was started with; or of an official VTP directory.

    Without ``check`` its names need not be installed: a tokenizer loads without its objectives' plugins.

    Raises:
        DataFault: there is no run.
        StackFault: a secret is masked in it; see :func:`load_stack` for the rest.
    """
    if is_onnx(run):
        raise DataFault(
            f"{run} is an export to ONNX: graphs for onnxruntime, and vtp verify; give the run it was made of, or "
            "another export of it"
        )
    if is_autoencoder(run) or is_official(run):
        found = autoencoder_tree(run) if is_autoencoder(run) else official_tree(run)
        tree = merged(OmegaConf.create(found), overrides)
        return (check_stack if check else Stack)(run.name, tree, registry)
    file = run / "stack.yaml"
    if not file.is_file():
        if (run / "pipeline.json").is_file():
            stages = " ".join(sorted(str(path.parent) for path in run.glob("*/stack.yaml")))
            raise DataFault(f"{run} is a pipeline; the runs in it are {stages}")
        raise DataFault(
            f"{run} is no run directory: it has no stack.yaml; give a directory that vtp train or vtp export "
            "wrote, or an official VTP directory"
        )
    name = _run_name(run)
    tree = merged(read(file), overrides)
    if check and "***" in file.read_text(encoding="utf-8") and "***" in str(tree):
        raise StackFault(
            f"{file} has a masked secret (***); start from your own stack file, or override that key"
        )
    return (check_stack if check else Stack)(name, tree, registry)


def _run_name(run: Path) -> str:
    """What the run's stack was called; an export has no record of a run."""
    record = run / "run.json"
    if not record.is_file():
        return run.name
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["name"])
    except (ValueError, LookupError, TypeError) as error:
        raise DataFault(f"{record} is no record of a run: {type(error).__name__}: {error}") from error


def find_stack(source: str, registry: Registry) -> Path:
    """The file behind a name or a path."""
    path = Path(source)
    if (path / "stack.yaml").is_file():
        return path / "stack.yaml"
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"}:
        raise StackFault(f"no stack file {source}")
    entry = registry.find("stacks", source, "stack")
    package = importlib.util.find_spec(entry.target)
    places = list(package.submodule_search_locations or []) if package else []
    for place in places:
        if (Path(place) / f"{source}.yaml").is_file():
            return Path(place) / f"{source}.yaml"
    raise PluginFault(
        f"stacks {source!r}: package {entry.target} of {entry.distribution} has no {source}.yaml"
    )


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


# ---- checks


def check_stack(name: str, config: Mapping[Any, Any], registry: Registry) -> Stack:
    """Check keys, engine values and names of a resolved tree; no component is imported."""
    if "stages" in config:
        raise StackFault(f"{name} has stages: it is a pipeline, run with vtp run {name}")
    for key in config:
        if key not in KEYS:
            raise StackFault(f"unknown key {key!r} in the stack{suggestion(str(key), KEYS)}")
    stack = Stack(name, {key: node for key, node in config.items() if node is not None}, registry)
    if "encoder" not in stack.config:
        raise StackFault(
            "the stack has no encoder; write encoder: {use: vit}, or start from an earlier run: tokenizer.from=RUN"
        )
    _check_engine_keys(stack)
    for key, node in _components(stack):
        _check_component_keys(stack, key, node)
    _check_names(stack)
    return stack


def _check_engine_keys(stack: Stack) -> None:
    if stack.dial not in options.DIALS:
        raise StackFault(f"size: no dial {stack.dial!r}{suggestion(stack.dial, options.DIALS)}")
    steps, _, _ = stack.train.steps, stack.data, stack.run
    for name, node in _nodes(stack, "objectives"):
        key = f"objectives.{name}"
        if name in _TAKEN:
            raise StackFault(
                f"{key}: the engine uses this name; write my_{name}: {{use: {node.get('use', name)}}}"
            )
        keys = _engine_keys(options.Objective, key, node)
        if keys.stop is not None and options.steps_of(keys.stop, steps) <= options.steps_of(
            keys.start, steps
        ):
            raise StackFault(f"{key}: it stops at {keys.stop}, before it has started at {keys.start}")
    for name, node in _nodes(stack, "probes"):
        _engine_keys(options.Probe, f"probes.{name}", node)
    _engine_keys(options.Generator, "generator", stack.config.get("generator"))
    _engine_keys(options.Sampler, "sampler", stack.config.get("sampler"))
    dial = stack.tokenizer.size
    if dial is not None and dial not in options.DIALS:
        raise StackFault(f"tokenizer.size: no dial {dial!r}{suggestion(dial, options.DIALS)}")


def _check_component_keys(stack: Stack, key: str, node: Mapping[str, Any]) -> None:
    """``from``, ``frozen`` and ``optim``: where they have no effect they are refused."""
    _not_from(key, node)
    section, _, _ = key.partition(".")
    trains = section in {"encoder", "bottleneck", "decoder", "generator", "modules"}
    for word, works in (("frozen", trains), ("optim", trains or section == "objectives")):
        if word in node and not works and section not in {"data", "probes", "hooks"}:
            why = "a chain trains as one" if section.startswith("bottleneck") else "it has no effect here"
            raise StackFault(f"{key}: {word!r}: {why}")
    if trains and not isinstance(node.get("frozen", False), bool):
        raise StackFault(f"{key}.frozen: true or false, not {node['frozen']!r}")
    if "optim" in node and (trains or section == "objectives"):
        written = _mapping(f"{key}.optim", node["optim"])
        validated(options.Optim, f"{key}.optim", {**stack.train.optim.model_dump(), **written})


def _not_from(key: str, node: Mapping[str, Any]) -> None:
    if "from" in node:
        raise StackFault(f"{key}.from: to start from an earlier run is not built yet")


def _engine_keys(model: type[M], key: str, node: Any) -> M:
    """The engine's keys of a node; what else it has are options of the component."""
    found = {name: value for name, value in _mapping(key, node).items() if name in model.model_fields}
    return validated(model, key, found)


def _mapping(key: str, node: Any) -> Mapping[str, Any]:
    if node is None:
        return {}
    if not isinstance(node, Mapping):
        raise StackFault(f"{key}: a mapping of keys is wanted, write {{}} for none, not {node!r}")
    return node


def _nodes(stack: Stack, section: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Entries of a section by instance name."""
    entries = _mapping(section, stack.config.get(section))
    for name in entries:
        if not isinstance(name, str) or not _INSTANCE.fullmatch(name):
            raise StackFault(f"{section}: {name!r} is no name; letters, digits, - and _ are")
    return [(name, _mapping(f"{section}.{name}", node)) for name, node in entries.items()]


def _components(stack: Stack) -> list[tuple[str, Mapping[str, Any]]]:
    """Every component's place and node."""
    found = [(key, _mapping(key, stack.config[key])) for key in SINGLES if key in stack.config]
    links = links_of(stack.config)
    whole = not isinstance(stack.config.get("bottleneck"), list)
    found += [("bottleneck" if whole else f"bottleneck[{index}]", link) for index, link in enumerate(links)]
    return found + [
        (f"{section}.{name}", node) for section in sorted(ENTRIES) for name, node in _nodes(stack, section)
    ]


def _check_names(stack: Stack) -> None:
    find = stack.registry.find
    find("modalities", stack.config.get("modality", "image"), "modality")
    for key, node in _components(stack):
        section, _, name = key.partition(".")
        kind = SINGLES.get(section, "bottlenecks" if section.startswith("bottleneck") else section)
        if not name and "use" not in node:
            raise StackFault(f"{key}: 'use' is missing{suggestion('', stack.registry.names(kind))}")
        find(kind, node.get("use", name), key if name and "use" not in node else f"{key}.use")
    path = (stack.config.get("generator") or {}).get("path")
    if path is not None:
        find("paths", path.get("use"), "generator.path.use")
    for name in stack.train.trackers:
        find("hooks", name, "train.trackers")
