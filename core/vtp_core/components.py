"""From a name and options in a stack to an object, with options checked before anything is built."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
from torch import nn

from vtp_core.errors import Fault, PluginFault, StackFault, suggestion
from vtp_core.validation import validated
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
        for option, name in self.modules.items():
            if name not in (shared or {}):
                raise StackFault(f"{self.key}.{option}: {name!r} of 'modules' is for objectives only")
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
    return _checked(key, name, cls, dial_options(cls, dial), written, modules, taken)


def dial_options(cls: Any, dial: str) -> dict[str, Any]:
    """Defaults that a class declares for the stack's ``size``."""
    return dict(getattr(cls, "sizes", {}).get(dial, {}))


def _checked(
    key: str,
    name: str,
    cls: Any,
    defaults: dict[str, Any],
    written: dict[str, Any],
    modules: frozenset[str],
    taken: frozenset[str],
) -> Component:
    schema, module_options = schema_of(cls)
    known = {*schema.model_fields, *module_options}
    for option in written:
        if option not in known:
            raise StackFault(f"{key}: unknown option {option!r}{suggestion(str(option), known | taken)}")
    for option in defaults:
        if option not in known:
            raise PluginFault(f"{key}: {cls.__name__}.sizes names {option!r}, which is no option")
    options = {**defaults, **written}
    named = {option: options.pop(option) for option in module_options if option in options}
    checked = validated(schema, key, options)
    named = {option: target for option, target in named.items() if target is not None}
    for option, target in named.items():
        if not isinstance(target, str) or target not in modules:
            raise StackFault(
                f"{key}.{option}: no {target!r} under 'modules'{suggestion(str(target), modules)}"
            )
    for option in _compulsory(cls, module_options):
        if option not in named:
            raise StackFault(
                f"{key}.{option} is missing; name an entry of 'modules'{suggestion('', modules)}"
            )
    return Component(key, name, cls, {option: getattr(checked, option) for option in options}, named)


def _compulsory(cls: Any, module_options: tuple[str, ...]) -> list[str]:
    parameters = inspect.signature(cls.__init__).parameters
    return [option for option in module_options if parameters[option].default is inspect.Parameter.empty]


@functools.cache
def schema_of(cls: Any) -> tuple[type[pydantic.BaseModel], tuple[str, ...]]:
    """Options of a component as a pydantic model, and the names of those that take a module.

    Raises:
        PluginFault: the annotation of an option cannot be resolved at run time.
    """
    parameters = inspect.signature(cls.__init__).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    fields: dict[str, Any] = {}
    modules = []
    for option, hint in _hints(cls, options).items():
        if _takes_module(hint):
            modules.append(option)
        else:
            default = ... if options[option] is inspect.Parameter.empty else options[option]
            fields[option] = (hint, default)
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    model: type[pydantic.BaseModel] = pydantic.create_model(
        f"{cls.__name__}Options", __config__=config, **fields
    )
    return model, tuple(modules)


def _hints(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations of the options alone: that of ``spec`` may be imported for type checkers only."""
    written = getattr(cls.__init__, "__annotations__", {})
    bare = types.SimpleNamespace(__annotations__={name: written.get(name, Any) for name in options})
    try:
        return typing.get_type_hints(bare, getattr(cls.__init__, "__globals__", {}), include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise PluginFault(
            f"{cls.__module__}.{cls.__name__}: {error}; annotations of options must be importable at run time"
        ) from error


def _takes_module(hint: Any) -> bool:
    return any(
        isinstance(part, type) and issubclass(part, nn.Module) for part in (hint, *typing.get_args(hint))
    )
