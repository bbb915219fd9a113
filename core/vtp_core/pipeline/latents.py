"""The stage that writes latents of an earlier stage's tokenizer."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import OmegaConf

from vtp_core.errors import StackFault
from vtp_core.overrides import merged
from vtp_core.pipeline import artefacts
from vtp_core.pipeline.definition import Node
from vtp_core.pipeline.stages import Places, StackStage, Stage
from vtp_core.validation import validated
from vtp_plugins.registry import Registry

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset

_GIVEN = frozenset({"run", "out", "overrides", "registry", "note"})
"""Arguments of the writer that the pipeline gives; the others are the stage's options."""
_OVERRIDES = re.compile(r"~?(data|teachers)[.=]")


@dataclass(frozen=True, slots=True)
class LatentsStage:
    """Latents of a data set, written by the tokenizer of an earlier stage.

    Args:
        name: of the stage.
        options: of :func:`vtp_core.latents.writer.write_latents`.
        changes: overrides of ``data`` and ``teachers`` of the tokenizer's stack, such as ``data.use=folder``.
        reads: ``tokenizer`` -> the earlier stage.
        registry: what names resolve through.
    """

    name: str
    options: Mapping[str, Any]
    changes: tuple[str, ...]
    reads: Mapping[str, str]
    registry: Registry

    @classmethod
    def of(cls, name: str, node: Node, reads: Mapping[str, str], registry: Registry) -> LatentsStage:
        """The stage as written; overrides that are not of the tokenizer's stack are of its options.

        Raises:
            StackFault: an override that is no ``key=value``.
        """
        changes = tuple(item for item in node.changes if _OVERRIDES.match(item))
        options = dict(node.latents or {})
        for item in node.changes:
            key, equals, value = item.partition("=")
            if item in changes:
                continue
            if not equals or "." in key:
                raise StackFault(f"{item}: write an option of latents as key=value, or data.key=value")
            try:
                options[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise StackFault(f"{item}: {str(error).splitlines()[0]}") from error
        return cls(name, options, changes, reads, registry)

    @property
    def title(self) -> str:
        return "latents"

    def written(self) -> dict[str, Any]:
        return {"latents": dict(self.options), **self.reads, "with": list(self.changes)}

    def identity(self) -> Any:
        return {"latents": dict(self.options), "with": list(self.changes)}

    def outside(self) -> dict[str, str]:
        written = [part for item in self.changes for part in re.split(r"[^A-Za-z0-9_-]+", item)]
        return artefacts.code_of(written, self.registry)

    def fingerprint(self, places: Places) -> str | None:
        from vtp_core.build import blueprint, spec_of
        from vtp_core.evaluation import dataset_component, dataset_factory
        from vtp_core.stack import load_run_stack

        stack = load_run_stack(places[self.reads["tokenizer"]], self.registry, self.changes, check=False)
        component = dataset_component(stack)
        dataset = dataset_factory(stack, spec_of(blueprint(stack)))(self.options.get("split"))
        return artefacts.digest([component.name, component.options, dataset.fingerprint()])

    def check(self, stages: Mapping[str, Stage]) -> None:
        import pydantic

        from vtp_core.latents.writer import write_latents

        hints = typing.get_type_hints(write_latents)
        options: dict[str, Any] = {
            name: (hints[name], parameter.default)
            for name, parameter in inspect.signature(write_latents).parameters.items()
            if name not in _GIVEN
        }
        config = pydantic.ConfigDict(extra="forbid")
        validated(pydantic.create_model("Latents", __config__=config, **options), "latents", self.options)
        self.promised(stages)  # its data is there

    def promised(self, stages: Mapping[str, Stage]) -> Dataset | None:
        from vtp_core.build import blueprint, spec_of
        from vtp_core.evaluation import dataset_factory
        from vtp_core.pipeline.promised import PromisedLatents

        if self.options.get("teacher"):
            return None  # what a teacher gives is known when it is built
        source = stages[self.reads["tokenizer"]]
        assert isinstance(source, StackStage)
        config = merged(OmegaConf.create(source.stack.config), self.changes)
        spec = spec_of(blueprint(source.stack))
        dataset = dataset_factory(replace(source.stack, config=config), spec)(self.options.get("split"))
        return PromisedLatents(dataset, spec, bool(self.options.get("images")))

    def fits(self, folder: Path) -> bool:
        return True

    def work(self, folder: Path, places: Places, note: Callable[[str], object]) -> None:
        from vtp_core.latents.writer import write_latents

        given: dict[str, Any] = dict(self.options)
        run = places[self.reads["tokenizer"]]
        write_latents(run, folder, overrides=self.changes, registry=self.registry, note=note, **given)

    def artefact(self, folder: Path) -> str:
        return artefacts.latents_artefact(folder)
