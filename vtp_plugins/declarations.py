"""Whether what an objective declares is what the engine takes it for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from vtp_plugins.needs import Need
from vtp_plugins.objective import Objective

Fail = Callable[[str], None]


def check_declarations(objective: Objective, again: Objective, fail: Fail) -> None:
    """Needs, views, masks, shadow, exports and coupled.

    Args:
        objective: the one that is checked.
        again: built with the same options.
        fail: raises, with a message.
    """
    if not objective.needs or not all(isinstance(need, Need) for need in objective.needs.values()):
        fail(f"needs is {objective.needs!r}; set self.needs = {{'slot': Need(...)}} after super().__init__()")
    _check_brought(objective, again, fail)
    for slot, need in objective.needs.items():
        named = {output.partition("@")[2] for output in need.want if "@" in output} | {need.mask}
        for mask in sorted(m for m in named if m is not None and m != "any"):
            if mask not in objective.masks:
                fail(f"need {slot!r} names mask {mask!r}; bring its sampler in self.masks[{mask!r}]")
    for name in objective.shadow:
        if not isinstance(getattr(objective, name, None), nn.Module):
            fail(f"shadow names {name!r}, which is no submodule")
    for name in objective.exports:
        if not callable(getattr(objective, name, None)):
            fail(f"exports names {name!r}, which is neither a method nor a module")
    if not isinstance(objective.coupled, bool):
        fail(f"coupled is {objective.coupled!r}; it is True or False")


def _check_brought(objective: Objective, again: Objective, fail: Fail) -> None:
    """Views and masks are callable, typed, and equal between equal builds."""
    for kind, attribute in (("views", "field"), ("masks", "view")):
        for name, made in getattr(objective, kind).items():
            if not callable(made) or not isinstance(getattr(made, attribute, None), str):
                fail(f"{kind}[{name!r}] must be callable with a str attribute {attribute!r}")
            if made != getattr(again, kind).get(name):
                fail(f"{kind}[{name!r}] differs between equal builds; make it a frozen dataclass")
    for name, view in objective.views.items():
        if not (view.crops is None or isinstance(view.crops, int)):
            fail(f"views[{name!r}].crops is {view.crops!r}; it is a number of crops, or None")
