"""From a name and options in a stack to an object, with options checked before anything is built."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
from torch import nn

from vtp_core.errors import Fault, PluginFault, StackFault, suggestion
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec


@dataclass(frozen=True, slots=True)
class Component:
    """A checked component, not built yet.

    Attributes:
        key: where the stack names it, ``objectives.dino``.
        name: its name in the registry.
        cls: its class.
        options: its options: the dial's, overridden by the stack's.
        modules: options that name an entry of the stack's ``modules``.
    """

    key: str
    name: str
    cls: Any
    options: dict[str, Any]
    modules: dict[str, str] = field(default_factory=dict)

    def build(self, spec: Spec, shared: Mapping[str, nn.Module] | None = None, **given: Any) -> Any:
        """Construct it; the constructor's ``ValueError`` is told with the stack's key.

        Args:
            spec: what it is told of the tokenizer.
            shared: the stack's ``modules`` by name.
            **given: what the engine hands over besides options.
        """
        modules = {option: (shared or {})[name] for option, name in self.modules.items()}
        try:
            return self.cls(spec, **self.options, **modules, **given)
        except Fault:
            raise
        except (ValueError, LookupError) as error:
            raise StackFault(f"{self.key}: {error}") from error
        except TypeError as error:
            raise PluginFault(f"{self.key}: {self.cls.__name__} breaks the contract: {error}") from error


def resolve(
    registry: Registry,
    kind: str,
    key: str,
    node: Mapping[str, Any],
    dial: str,
    modules: frozenset[str] = frozenset(),
    taken: frozenset[str] = frozenset(),
) -> Component:
    """Load the class that a stack's node names and check the node's options.

    Args:
        registry: what is installed.
        kind: group of the component.
        key: the node's place in the stack; its last part is the name unless ``use`` is written.
        node: options and ``use``, perhaps among keys that are the engine's own.
        dial: the stack's ``size``.
        modules: names under the stack's ``modules``.
        taken: the engine's own keys, left out of the options but known to suggestions.

    Raises:
        StackFault: unknown name or option, or a value of the wrong type.
        PluginFault: the plugin fails to import or its signature cannot be read.
    """
    name = node.get("use", key.rpartition(".")[2])
    cls = registry.load(kind, name, key)
    written = {option: value for option, value in node.items() if option != "use" and option not in taken}
    options = {**dial_options(cls, dial), **written}
    return _checked(key, name, cls, options, modules, taken)


def dial_options(cls: Any, dial: str) -> dict[str, Any]:
    """Defaults that a class declares for the stack's ``size``."""
    return dict(getattr(cls, "sizes", {}).get(dial, {}))


def _checked(
    key: str, name: str, cls: Any, options: dict[str, Any], modules: frozenset[str], taken: frozenset[str]
) -> Component:
    schema, module_options = schema_of(cls)
    for option in options:
        if option not in schema.model_fields and option not in module_options:
            known = [*schema.model_fields, *module_options, *taken]
            raise StackFault(f"{key}: unknown option {option!r}{suggestion(option, known)}")
    named = {option: options.pop(option) for option in module_options if options.get(option) is not None}
    for option, target in named.items():
        if target not in modules:
            raise StackFault(f"{key}.{option}: no {target!r} under 'modules'{suggestion(str(target), modules)}")
    for option in module_options:
        options.pop(option, None)
    try:
        checked = schema.model_validate(options)
    except pydantic.ValidationError as error:
        raise StackFault("\n".join(f"{key}.{line}" for line in _lines(error))) from error
    return Component(key, name, cls, {option: getattr(checked, option) for option in options}, named)


def _lines(error: pydantic.ValidationError) -> list[str]:
    """One line per fault: where, what, and what was given."""
    lines = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("function-", "tagged")))
        lines.append(f"{place}: {fault['msg']}, got {fault.get('input')!r}")
    return lines


@functools.cache
def schema_of(cls: Any) -> tuple[type[pydantic.BaseModel], tuple[str, ...]]:
    """Options of a component as a pydantic model, and the names of those that take a module.

    Raises:
        PluginFault: an annotation cannot be resolved at run time.
    """
    try:
        hints = typing.get_type_hints(cls.__init__, include_extras=True)
    except NameError as error:
        raise PluginFault(
            f"{cls.__module__}.{cls.__name__}: {error}; annotations of options must be importable at run time"
        ) from error
    fields: dict[str, Any] = {}
    modules = []
    for option, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(option, Any)
        if _takes_module(hint):
            modules.append(option)
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[option] = (hint, default)
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    model: type[pydantic.BaseModel] = pydantic.create_model(f"{cls.__name__}Options", __config__=config, **fields)
    return model, tuple(modules)


def _takes_module(hint: Any) -> bool:
    return any(
        isinstance(part, type) and issubclass(part, nn.Module) for part in (hint, *typing.get_args(hint))
    )
