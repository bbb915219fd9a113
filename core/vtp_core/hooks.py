"""One plugin manager per engine: the engine's own forwards come last, and a misspelt hook is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from vtp_core.components import resolve
from vtp_core.errors import PluginFault, suggestion
from vtp_core.stack import Stack
from vtp_plugins.hookspecs import Hooks, hookimpl


class Defaults:
    """The engine's own implementations: run the call."""

    @hookimpl(trylast=True)
    def vtp_encode(self, call: Any, x: Any) -> Any:
        return call(x)

    @hookimpl(trylast=True)
    def vtp_decode(self, call: Any, z: Any) -> Any:
        return call(z)

    @hookimpl(trylast=True)
    def vtp_sample(self, call: Any, shape: Any) -> Any:
        return call(shape)


def manager_of(plugins: Mapping[str, Any]) -> pluggy.PluginManager:
    """A manager with the given plugins by instance name.

    Raises:
        PluginFault: a plugin implements a hook that does not exist, or with unknown arguments.
    """
    manager = pluggy.PluginManager("vtp")
    manager.add_hookspecs(Hooks)
    manager.register(Defaults(), "defaults")
    for name, plugin in plugins.items():
        known = [hook for hook in vars(Hooks) if hook.startswith("vtp_")]
        for attribute in dir(plugin):
            if attribute.startswith("vtp_") and attribute not in known:
                raise PluginFault(f"hooks.{name}: no hook {attribute!r}{suggestion(attribute, known)}")
            if attribute.startswith("vtp_") and not hasattr(getattr(plugin, attribute), "vtp_impl"):
                raise PluginFault(
                    f"hooks.{name}: {attribute} would never be called; decorate it with @hookimpl"
                )
        try:
            manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            raise PluginFault(f"hooks.{name}: {str(error).splitlines()[-1]}") from error
    return manager


def build_hooks(stack: Stack, spec: Any) -> dict[str, Any]:
    """The stack's hook plugins and trackers, built."""
    nodes = stack.section("hooks") | {name: {} for name in stack.train.trackers}
    named = {n: resolve(stack.registry, "hooks", f"hooks.{n}", o, stack.dial) for n, o in nodes.items()}
    return {name: component.build(spec) for name, component in named.items()}
