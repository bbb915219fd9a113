"""The contract of vtp-plugins: everything a plugin author imports. Exports are lazy, so the registry costs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtp_plugins.clock import Clock as Clock
    from vtp_plugins.hookspecs import hookimpl as hookimpl
    from vtp_plugins.needs import Need as Need
    from vtp_plugins.needs import Outputs as Outputs
    from vtp_plugins.objective import AdversarialObjective as AdversarialObjective
    from vtp_plugins.objective import Objective as Objective
    from vtp_plugins.reading import Reading as Reading
    from vtp_plugins.spec import Spec as Spec

_HOME = {
    "AdversarialObjective": "objective",
    "Clock": "clock",
    "Need": "needs",
    "Objective": "objective",
    "Outputs": "needs",
    "Reading": "reading",
    "Spec": "spec",
    "hookimpl": "hookspecs",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtp_plugins' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vtp_plugins.{_HOME[name]}"), name)
