"""From a name and options to an object: every fault is told with its key, before anything is built."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field
from torch import nn

from vtp_core.components import Component, dial_options, resolve, schema_of
from vtp_core.errors import DataFault, PluginFault, StackFault
from vtp_plugins.registry import Entry, Registry
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from decimal import Decimal


class Head(nn.Module):
    """Something to share."""


class Thing:
    """All kinds of options."""

    sizes: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"width": 8}, "s": {"width": 16, "law": "b"}}

    def __init__(
        self,
        spec: Spec,
        *,
        width: int,
        law: Literal["a", "b"] = "a",
        share: Annotated[float, Field(ge=0, le=1)] = 0.5,
        sides: int | tuple[int, ...] = 4,
        names: tuple[str, ...] = (),
        untyped: Any = None,
        head: Head | None = None,
    ) -> None:
        if law == "b" and share == 1:
            raise ValueError("law b wants a share below 1")
        self.options = {
            "width": width,
            "law": law,
            "share": share,
            "sides": sides,
            "names": names,
            "head": head,
        }


class Needy:
    def __init__(self, spec: Spec, *, head: Head) -> None:
        self.head = head


class Unsized:
    sizes: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"depht": 3}}

    def __init__(self, spec: Spec, *, depth: int = 1) -> None: ...


class Bare:
    """No constructor of its own."""


class HiddenSpec:
    """Only the options' annotations are read: that of ``spec`` may be for type checkers alone."""

    def __init__(self, spec: Decimal, *, depth: int = 1) -> None:
        self.depth = depth


class HiddenOption:
    def __init__(self, spec: Spec, *, depth: Decimal | None = None) -> None: ...


class Sick:
    def __init__(self, spec: Spec, *, error: str = "value") -> None:
        kinds: dict[str, Exception] = {
            "value": ValueError("of no value"),
            "lookup": LookupError("nothing there"),
            "type": TypeError("not what was promised"),
            "fault": DataFault("no weights"),
            "bug": ZeroDivisionError("ours"),
        }
        raise kinds[error]


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Component]:
    """``resolved(cls, option=value)`` resolves ``objectives.mine`` to a class."""

    def run(cls: Any, dial: str = "tiny", options: Any = None, **more: Any) -> Component:
        registry, node = Registry(), {**(options or {}), **more}
        monkeypatch.setattr(
            registry, "_entries", {("objectives", "mine"): [Entry("objectives", "mine", "", "x 1", cls)]}
        )
        modules, taken = frozenset({"prototypes"}), frozenset({"weight", "rows"})
        return resolve(registry, "objectives", "objectives.mine", node, dial, modules, taken)

    return run


Resolve = Callable[..., Component]


def test_options_are_the_dials_then_the_stacks(resolved: Resolve) -> None:
    assert dial_options(Thing, "s") == {"width": 16, "law": "b"}
    assert dial_options(Thing, "l") == {}
    found = resolved(Thing, "s", width="32", sides=[1, 2], names=["x"], weight=3)
    assert found.options == {"width": 32, "law": "b", "sides": (1, 2), "names": ("x",)}
    assert (found.key, found.name, found.cls) == ("objectives.mine", "mine", Thing)
    built = found.build(Spec())
    assert built.options == {
        "width": 32,
        "law": "b",
        "share": 0.5,
        "sides": (1, 2),
        "names": ("x",),
        "head": None,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"widht": 3}, r"^objectives\.mine: unknown option 'widht'; did you mean 'width'\?"),
        ({"wieght": 3}, r"unknown option 'wieght'; did you mean 'weight'\?"),
        ({"haed": "prototypes"}, r"unknown option 'haed'; did you mean 'head'\?"),
        ({3: 3}, "unknown option 3"),
        ({"width": "many"}, r"^objectives\.mine\.width: .*valid integer.*got 'many'$"),
        ({"width": 1.5}, r"objectives\.mine\.width: "),
        ({"width": None}, r"objectives\.mine\.width: "),
        ({"law": "c"}, r"objectives\.mine\.law: Input should be 'a' or 'b', got 'c'"),
        ({"share": 1.5}, r"objectives\.mine\.share: .*less than or equal to 1"),
        ({"sides": "x"}, r"^objectives\.mine\.sides: .*integer.*, or .*tuple.*, got 'x'$"),
        ({"sides": [1, "x"]}, r"^objectives\.mine\.sides\.1: .*integer.*, got 'x'$"),
        ({"names": "x"}, r"objectives\.mine\.names: "),
        (
            {"head": "prototype"},
            r"objectives\.mine\.head: no 'prototype' under 'modules'; did you mean 'prototypes'",
        ),
        ({"head": {"use": "x"}}, r"objectives\.mine\.head: no \{'use': 'x'\} under 'modules'"),
    ],
)
def test_a_wrong_option_is_told_by_its_key(resolved: Resolve, options: dict[Any, Any], words: str) -> None:
    with pytest.raises(StackFault, match=words):
        resolved(Thing, options=options)


def test_every_fault_of_a_component_is_told_at_once(resolved: Resolve) -> None:
    with pytest.raises(StackFault) as fault:
        resolved(Thing, width="x", law="c")
    assert len(str(fault.value).splitlines()) == 2


def test_an_option_without_default_is_compulsory(resolved: Resolve) -> None:
    assert resolved(Thing, "tiny").options == {"width": 8}
    with pytest.raises(StackFault, match=r"objectives\.mine\.width: is missing"):
        resolved(Thing, "l")


# ---- modules of the stack


def test_a_module_is_named_and_handed_over(resolved: Resolve) -> None:
    found, head = resolved(Thing, head="prototypes"), Head()
    assert found.modules == {"head": "prototypes"}
    assert "head" not in found.options
    assert found.build(Spec(), {"prototypes": head}).options["head"] is head
    assert resolved(Thing, head=None).build(Spec()).options["head"] is None


def test_a_module_without_default_must_be_named(resolved: Resolve) -> None:
    with pytest.raises(
        StackFault, match=r"objectives\.mine\.head is missing; name an entry of 'modules'; known: prototypes"
    ):
        resolved(Needy)
    assert resolved(Needy, head="prototypes").modules == {"head": "prototypes"}


def test_what_is_built_before_the_modules_cannot_have_one(resolved: Resolve) -> None:
    with pytest.raises(
        StackFault, match=r"objectives\.mine\.head: 'prototypes' of 'modules' is for objectives only"
    ):
        resolved(Needy, head="prototypes").build(Spec())


# ---- classes that break the contract


def test_a_dial_that_names_no_option_is_the_plugins_fault(resolved: Resolve) -> None:
    with pytest.raises(PluginFault, match=r"Unsized\.sizes names 'depht', which is no option"):
        resolved(Unsized)
    assert resolved(Unsized, "l", depth=2).options == {"depth": 2}


def test_a_class_without_a_constructor_has_no_options(resolved: Resolve) -> None:
    assert schema_of(Bare)[0].model_fields == {}
    with pytest.raises(StackFault, match="unknown option 'x'"):
        resolved(Bare, x=1)
    with pytest.raises(PluginFault, match=r"objectives\.mine: Bare breaks the contract"):
        resolved(Bare).build(Spec())


def test_the_annotation_of_spec_need_not_be_importable(resolved: Resolve) -> None:
    assert resolved(HiddenSpec, depth="3").build(Spec()).depth == 3


def test_an_option_whose_annotation_cannot_be_resolved_is_the_plugins_fault(resolved: Resolve) -> None:
    with pytest.raises(
        PluginFault, match=r"HiddenOption: name 'Decimal' is not defined; annotations of options"
    ):
        resolved(HiddenOption)


@pytest.mark.parametrize("hint", ["pathlib.Nothing", "int[3]", "a b", "int | 3"])
def test_whatever_an_annotation_raises_is_the_plugins_fault(resolved: Resolve, hint: str) -> None:
    def constructor(self: Any, spec: Spec, *, option: int = 1) -> None: ...

    constructor.__annotations__["option"] = hint
    cls = type("Odd", (), {"__init__": constructor})
    with pytest.raises(PluginFault, match="annotations of options must be importable"):
        resolved(cls)


# ---- building


@pytest.mark.parametrize(
    ("error", "fault", "words"),
    [
        ("value", StackFault, r"^objectives\.mine: of no value$"),
        ("lookup", StackFault, r"^objectives\.mine: nothing there$"),
        ("type", PluginFault, r"^objectives\.mine: Sick breaks the contract: not what was promised$"),
        ("fault", DataFault, "^no weights$"),
        ("bug", ZeroDivisionError, "ours"),
    ],
)
def test_what_a_constructor_raises_is_told_with_its_key(
    resolved: Resolve, error: str, fault: type[Exception], words: str
) -> None:
    with pytest.raises(fault, match=words):
        resolved(Sick, error=error).build(Spec())


def test_options_that_are_right_one_by_one_may_be_wrong_together(resolved: Resolve) -> None:
    with pytest.raises(StackFault, match=r"objectives\.mine: law b wants a share below 1"):
        resolved(Thing, law="b", share=1).build(Spec())


# ---- what is installed


def test_every_installed_component_has_readable_options() -> None:
    for entry in Registry().entries():
        if entry.kind not in {"stacks", "importers"}:  # YAML, and key maps
            schema, _ = schema_of(entry.load())
            known = set(schema.model_fields)
            for dial in getattr(entry.load(), "sizes", {}):
                assert set(dial_options(entry.load(), dial)) <= known, entry


def test_a_single_file_plugin_is_a_component(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, spec, *, power: int = 2):\n        self.power = power\n"
        "PLUGINS = {'probes': {'mine': Mine}}\n"
    )
    registry = Registry([tmp_path / "mine.py"])
    found = resolve(
        registry, "probes", "probes.mine", {"power": "3", "every": 5}, "tiny", taken=frozenset({"every"})
    )
    assert found.build(Spec()).power == 3
    assert found.cls.__module__ in sys.modules
