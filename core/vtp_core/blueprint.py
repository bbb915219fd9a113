"""From a stack to its components: every name is resolved and every option checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vtp_core import options
from vtp_core.components import Component, resolve
from vtp_core.stack import Stack, links_of


@dataclass(slots=True)
class Blueprint:
    """A stack with every component resolved and checked, nothing built."""

    stack: Stack
    modality: Component
    encoder: Component | None
    links: list[Component]
    decoder: Component | None
    generator: Component | None
    path: Component | None
    sampler: Component | None
    teachers: dict[str, Component]
    modules: dict[str, Component]
    objectives: dict[str, Component]
    views: dict[str, Component]


def blueprint(stack: Stack) -> Blueprint:
    """Resolve and check every component of a stack.

    Raises:
        StackFault: an unknown option or a wrong value.
        PluginFault: a plugin fails to import.
    """
    config, registry, dial = stack.config, stack.registry, stack.dial
    shared = frozenset(stack.section("modules"))

    def one(
        kind: str, key: str, node: Mapping[str, Any] | None, taken: frozenset[str] = frozenset(),
        size: str = dial,
    ) -> Any:  # fmt: skip
        if node is None:
            return None
        return resolve(registry, kind, key, node, size, shared, taken | {"optim", "frozen"})

    def several(kind: str, section: str, taken: frozenset[str] = frozenset()) -> dict[str, Component]:
        return {n: one(kind, f"{section}.{n}", node, taken) for n, node in stack.section(section).items()}

    generator, own = config.get("generator"), stack.tokenizer.size or dial
    return Blueprint(
        stack=stack,
        modality=one("modalities", "modality", {"use": config.get("modality", "image")}),
        encoder=one("encoders", "encoder", config.get("encoder"), size=own),
        links=[
            one("bottlenecks", f"bottleneck[{i}]", link, size=own) for i, link in enumerate(links_of(config))
        ],
        decoder=one("decoders", "decoder", config.get("decoder"), size=own),
        generator=one("generators", "generator", generator, options.GENERATOR_KEYS),
        path=one("paths", "generator.path", (generator or {}).get("path")),
        sampler=one("samplers", "sampler", config.get("sampler"), options.SAMPLER_KEYS),
        teachers=several("teachers", "teachers"),
        modules=several("modules", "modules"),
        objectives=several("objectives", "objectives", options.OBJECTIVE_KEYS),
        views=several("views", "views"),
    )
