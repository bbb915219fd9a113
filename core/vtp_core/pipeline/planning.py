"""From a pipeline's definition to stages whose stacks are loaded and checked, before any of them runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vtp_core.errors import Fault, StackFault
from vtp_core.pipeline import artefacts
from vtp_core.pipeline.definition import Definition, Node, read_pipeline
from vtp_core.pipeline.latents import LatentsStage
from vtp_core.pipeline.stages import PLACES, StackStage, Stage
from vtp_core.run.environment import masked
from vtp_core.stack import load_stack
from vtp_plugins.registry import Registry


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A checked pipeline.

    Attributes:
        name: of the file, without its suffix.
        folder: the directory that ``run.dir`` asks for; None for ``runs/<date>-<pipeline>-<hash>``.
        stages: in order.
        registry: what its names resolve through.
    """

    name: str
    folder: Path | None
    stages: tuple[Stage, ...]
    registry: Registry

    def tree(self) -> dict[str, Any]:
        """The resolved pipeline: every stack is written out; loading it gives the same pipeline."""
        written = {stage.name: stage.written() for stage in self.stages}
        tree: dict[str, Any] = masked({"name": self.name, "stages": written})
        return tree

    @property
    def digest(self) -> str:
        """Identity of the pipeline, wherever it runs."""
        return artefacts.digest(self.tree())

    def yaml(self) -> str:
        return str(yaml.safe_dump(self.tree(), sort_keys=False, allow_unicode=True, width=110))


def load_pipeline(
    source: str | Path, overrides: Iterable[str] = (), registry: Registry | None = None
) -> Pipeline:
    """Load a pipeline and the stacks of all its stages; check keys, names, options and plans.

    Args:
        source: a shipped name, a YAML file or a pipeline directory.
        overrides: ``stage.key=value`` for a stage's stack, ``run.dir=DIR`` for the pipeline.
        registry: what is installed; made afresh by default.

    Raises:
        StackFault: anything that a stack may be wrong in, with the stage's name before it.
    """
    registry = registry or Registry()
    definition = read_pipeline(source, overrides, registry)
    stages: dict[str, Stage] = {}
    with tempfile.TemporaryDirectory(prefix="vtp-plan-") as folder:
        plans = _Plans(Path(folder), definition, registry)
        for name, node in definition.stages.items():
            stages[name] = _named(name, lambda node=node, name=name: plans.stage(name, node))
        for name, stage in stages.items():
            _named(name, lambda stage=stage: stage.check(stages))
    return Pipeline(definition.name, definition.folder, tuple(stages.values()), registry)


def _named(stage: str, act: Any) -> Any:
    """Do something for a stage; its faults name it."""
    try:
        return act()
    except Fault as fault:
        fault.args = (f"stage {stage}: {fault}", *fault.args[1:])
        raise


class _Plans:
    """Folders that stand for what the stages will leave: ``NAME/stack.yaml``, as in a run."""

    def __init__(self, folder: Path, definition: Definition, registry: Registry) -> None:
        self.folder, self.definition, self.registry = folder, definition, registry

    def stage(self, name: str, node: Node) -> Stage:
        reads = {role: getattr(node, role) for role in ("tokenizer", "data") if getattr(node, role)}
        if node.latents is not None:
            return LatentsStage.of(name, node, reads, self.registry)
        stack = load_stack(self._source(name, node), self._changes(node, reads), self.registry)
        (self.folder / name).mkdir()
        (self.folder / name / "stack.yaml").write_text(stack.yaml(), encoding="utf-8")
        return StackStage(name, stack, reads)

    def _source(self, name: str, node: Node) -> str:
        """What ``load_stack`` takes: a stack that is written out becomes a file."""
        if isinstance(node.stack, dict):
            file = self.folder / f"{node.name or name}.yaml"
            file.write_text(yaml.safe_dump(node.stack, sort_keys=False), encoding="utf-8")
            return str(file)
        near = self.definition.beside / str(node.stack)
        return str(near) if near.suffix in {".yaml", ".yml"} and near.is_file() else str(node.stack)

    def _changes(self, node: Node, reads: Mapping[str, str]) -> list[str]:
        """The stage's overrides, after those that make its references ones to plans."""
        for role, target in reads.items():
            written = [item for item in node.changes if item.startswith(f"{role}.{PLACES[role]}=")]
            if written:
                raise StackFault(f"{role}.{PLACES[role]} beside {role}: {target}; leave one out")
        given = []
        if "tokenizer" in reads:
            given.append(f"tokenizer.from={json.dumps(self._place(reads['tokenizer']))}")
        if "data" in reads:
            given.append(f"data={json.dumps({'use': 'latents', 'path': self._place(reads['data'])})}")
        return [*given, *node.changes]

    def _place(self, stage: str) -> str:
        return str(self.folder / stage)
