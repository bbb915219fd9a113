"""From a blueprint to modules, built in one order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core import options
from vtp_core.blueprint import Blueprint as Blueprint
from vtp_core.blueprint import blueprint as blueprint
from vtp_core.clock import keyed
from vtp_core.errors import PluginFault, StackFault, suggestion
from vtp_core.models.bottlenecks import Chain
from vtp_core.stack import Stack
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


@dataclass(slots=True)
class Model:
    """Everything that a step computes with.

    Attributes:
        spec: shapes of the tokenizer, complete.
        shared: the stack's ``modules`` by name.
        settings: the engine's keys of each objective.
        frozen: names of modules that don't train.
        sampler: built, or None.
        statistics: ``mean`` and ``std``, (C,) or (C, *grid), that generators see latents through; empty when
            unknown.
        condition: raw field that conditions the generator, or None.
        embed: texts to embeddings (n, E), for a generator that is conditioned on texts.
    """

    stack: Stack
    spec: Spec
    modality: Any
    encoder: nn.Module | None
    bottleneck: Chain | None
    decoder: nn.Module | None
    generator: nn.Module | None = None
    path: Any = None
    sampler: Any = None
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    shared: dict[str, nn.Module] = field(default_factory=dict)
    objectives: dict[str, Objective] = field(default_factory=dict)
    settings: dict[str, options.Objective] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    statistics: dict[str, Tensor] = field(default_factory=dict)
    condition: str | None = None
    drop_condition: float = 0.0
    embed: Callable[[Sequence[str]], Tensor] | None = None

    def tokenizer_modules(self) -> dict[str, nn.Module]:
        """Encoder, bottleneck and decoder, those that exist."""
        named = {"encoder": self.encoder, "bottleneck": self.bottleneck, "decoder": self.decoder}
        return {name: module for name, module in named.items() if module is not None}

    def modules(self) -> dict[str, nn.Module]:
        """Every trainable module by owner, in one fixed order."""
        named = self.tokenizer_modules()
        if self.generator is not None:
            named["generator"] = self.generator
        named |= {f"modules/{name}": module for name, module in self.shared.items()}
        return {**named, **self.objectives}

    def standardise(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, *grid) as generators see them."""
        if not self.statistics:
            return z
        mean, std = self._moments(z)
        return (z - mean) / std

    def restore(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`standardise`."""
        if not self.statistics:
            return z
        mean, std = self._moments(z)
        return z * std + mean

    def _moments(self, z: Tensor) -> list[Tensor]:
        found = [self.statistics[key].to(z) for key in ("mean", "std")]
        if found[0].ndim > 1 and found[0].shape != z.shape[1:]:
            raise ValueError(f"statistics are of latents {tuple(found[0].shape)}, not {tuple(z.shape[1:])}")
        return [value.view(*value.shape, *([1] * (z.ndim - 1 - value.ndim))) for value in found]


def build(plans: Blueprint, classes: int = 0, condition_width: int = 0) -> Model:
    """Build every module of a blueprint; each draws its weights from a stream of its own.

    Args:
        plans: every component, checked.
        classes: labels that the dataset knows.
        condition_width: E of the embeddings that condition a generator; 0 where labels do.
    """
    stack = plans.stack
    seed = stack.train.seed
    with _seeded(seed, "modality"):
        modality = plans.modality.build(Spec())
    spec = Spec(
        modality=plans.modality.name, signal_channels=modality.channels, dial=stack.dial, classes=classes,
        size=(0,) * modality.axes, patch=(1,) * modality.axes, condition_width=condition_width,
    )  # fmt: skip
    spec, encoder = _encoder(plans, spec, seed)
    spec, bottleneck = _bottleneck(plans, spec, seed)
    decoder = None
    if plans.decoder is not None:
        with _seeded(seed, "decoder"):
            decoder = plans.decoder.build(spec)
    model = Model(stack, spec, modality, encoder, bottleneck, decoder, frozen=_frozen(stack))
    _add_teachers(model, plans, seed)
    _add_generator(model, plans, seed)
    _add_objectives(model, plans, seed)
    for name, module in model.modules().items():
        if name in model.frozen:
            module.requires_grad_(False)
    return model


def spec_of(plans: Blueprint) -> Spec:
    """Shapes of a tokenizer before it is built: its encoder on the meta device costs nothing."""
    with torch.device("meta"):
        return tokenizer_only(replace(plans, decoder=None)).spec


def tokenizer_only(plans: Blueprint) -> Model:
    """The tokenizer without objectives, teachers and generator."""
    return build(replace(without_training(plans), generator=None, path=None, sampler=None))


def objectives_only(plans: Blueprint) -> Model:
    """The objectives, over a tokenizer that is on the meta device and so costs nothing."""
    with torch.device("meta"):
        model = tokenizer_only(replace(plans, decoder=None))
    _add_objectives(model, plans, plans.stack.train.seed)
    return model


def without_training(plans: Blueprint) -> Blueprint:
    """Tokenizer and generator without what only training needs."""
    return replace(plans, teachers={}, modules={}, objectives={}, views={})


@contextlib.contextmanager
def _seeded(seed: int, key: str) -> Iterator[None]:
    """Initial weights are a function of the seed and the component's place, not of build order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed(seed, "weights", key))
        yield


def _encoder(plans: Blueprint, spec: Spec, seed: int) -> tuple[Spec, nn.Module | None]:
    if plans.encoder is None:
        return spec, None
    with _seeded(seed, "encoder"):
        encoder = plans.encoder.build(spec)
    for attribute in ("width", "patch", "size"):
        if not hasattr(encoder, attribute):
            raise PluginFault(
                f"encoder {plans.encoder.name!r} has no attribute {attribute!r}; see protocols.Encoder"
            )
    depth = getattr(encoder, "depth", 0)
    return replace(spec, width=encoder.width, patch=encoder.patch, size=encoder.size, depth=depth), encoder


def _bottleneck(plans: Blueprint, spec: Spec, seed: int) -> tuple[Spec, Chain | None]:
    if plans.encoder is None:
        return spec, None
    links: list[nn.Module] = []
    for index, component in enumerate(plans.links):
        with _seeded(seed, f"bottleneck[{index}]"):
            link = component.build(spec)
        links.append(link)
        spec = replace(spec, channels=link.channels)
    return replace(spec, channels=spec.channels or spec.width), Chain(
        links, channels=spec.channels or spec.width
    )


def _frozen(stack: Stack) -> frozenset[str]:
    """Modules that don't train: those with ``frozen: true`` and those that ``tokenizer.frozen`` lists."""
    nodes = {key: stack.config.get(key) for key in ("encoder", "bottleneck", "decoder", "generator")}
    nodes |= {f"modules/{name}": node for name, node in stack.section("modules").items()}
    listed = (stack.config.get("tokenizer") or {}).get("frozen", ())
    for name in listed:
        if name not in nodes:
            raise StackFault(f"tokenizer.frozen: no module {name!r}{suggestion(str(name), nodes)}")
    flagged = {
        name for name, node in nodes.items() if isinstance(node, Mapping) and node.get("frozen") is True
    }
    return frozenset(flagged | set(listed))


def _add_teachers(model: Model, plans: Blueprint, seed: int) -> None:
    for name, component in plans.teachers.items():
        with _seeded(seed, component.key):
            model.teachers[name] = component.build(model.spec).requires_grad_(False).eval()
    widths = tuple((name, int(getattr(teacher, "width", 0))) for name, teacher in model.teachers.items())
    model.spec = replace(model.spec, teachers=widths)


def _add_generator(model: Model, plans: Blueprint, seed: int) -> None:
    if plans.generator is None:
        return
    node = plans.stack.config["generator"]
    given: dict[str, Any] = {}
    if "share" in node:
        shared = model.tokenizer_modules().get(node["share"])
        if shared is None:
            raise StackFault(
                f"generator.share: no {node['share']!r}{suggestion(node['share'], model.tokenizer_modules())}"
            )
        given["network"] = shared
    if plans.path is not None:
        model.path = plans.path.build(model.spec)
    keys = plans.stack.generator
    model.condition, model.drop_condition = keys.condition, keys.drop_condition
    kind = "" if keys.condition is None else "label" if not model.spec.condition_width else "embedding"
    model.spec = replace(model.spec, path=model.path, condition=kind)
    with _seeded(seed, "generator"):
        model.generator = plans.generator.build(model.spec, **given)
    if plans.sampler is not None:
        model.sampler = plans.sampler.build(model.spec)
    model.spec = replace(model.spec, generator_width=int(getattr(model.generator, "width", 0)))


def _add_objectives(model: Model, plans: Blueprint, seed: int) -> None:
    for name, component in plans.modules.items():
        with _seeded(seed, component.key):
            model.shared[name] = component.build(model.spec)
    for name, component in plans.objectives.items():
        with _seeded(seed, component.key):
            objective = component.build(model.spec, model.shared)
        if not isinstance(objective, Objective):
            raise PluginFault(
                f"{component.key}: {component.cls.__name__} is no subclass of vtp_plugins.Objective"
            )
        model.objectives[name] = objective
        keys = {
            k: v
            for k, v in plans.stack.section("objectives")[name].items()
            if k in options.Objective.model_fields
        }
        model.settings[name] = options.Objective.model_validate(keys)
    for name, component in plans.views.items():
        model.views[name] = component.build(model.spec)
    _merge_views(model)


def _merge_views(model: Model) -> None:
    """A view is defined once: the stack's definition wins, equal ones merge, unequal ones are an error."""
    owners: dict[str, str] = {}
    for name, objective in model.objectives.items():
        for view, definition in objective.views.items():
            if view in owners and model.views[view] != definition:
                raise StackFault(
                    f"view {view!r} is defined differently by objectives.{owners[view]} and "
                    f"objectives.{name}; define it once under views.{view}"
                )
            if view not in model.views:
                model.views[view] = definition
                owners[view] = name
