"""Every hook is documented, in the code and in the docs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pluggy
import pytest

from vtp_plugins.hookspecs import Hooks, hookimpl

HOOKS = {name: hook for name, hook in vars(Hooks).items() if name.startswith("vtp_")}
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
every = pytest.mark.parametrize("name", HOOKS)


def arguments(hook: Callable[..., object]) -> list[str]:
    return list(inspect.signature(hook).parameters)[1:]


def test_these_are_the_hooks() -> None:
    manager = pluggy.PluginManager("vtp")
    manager.add_hookspecs(Hooks)
    assert {name for name in vars(manager.hook) if name.startswith("vtp_")} == set(HOOKS)
    assert {n for n in HOOKS if getattr(manager.hook, n).spec.opts["firstresult"]} == {
        "vtp_encode",
        "vtp_decode",
        "vtp_sample",
    }


@every
def test_a_hook_has_a_docstring_and_types(name: str) -> None:
    hook = HOOKS[name]
    assert inspect.getdoc(hook)
    assert set(inspect.get_annotations(hook)) == {*arguments(hook), "return"}


@every
def test_the_page_documents_the_hook_with_its_arguments(name: str) -> None:
    row = re.search(rf"^\|\s*`{name}\(([^)]*)\)`", PAGE, flags=re.MULTILINE)
    assert row, f"docs/contract.md has no row for {name}"
    assert [argument.strip() for argument in row[1].split(",")] == arguments(HOOKS[name])


def test_the_page_documents_no_other_hook() -> None:
    assert set(re.findall(r"`(vtp_[a-z_]+)\(", PAGE)) == set(HOOKS)


@every
def test_a_plugin_may_take_fewer_arguments(name: str) -> None:
    manager = pluggy.PluginManager("vtp")
    manager.add_hookspecs(Hooks)

    class Plugin: ...

    def implementation(self: object) -> None: ...

    implementation.__name__ = name
    setattr(Plugin, name, hookimpl(implementation))
    manager.register(Plugin())
    manager.check_pending()
