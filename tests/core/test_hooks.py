from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rig import batch_of, engine_of, run

from vtp_core.errors import PluginFault
from vtp_plugins.hookspecs import hookimpl

STACK: dict[str, Any] = {"rebuild": {}, "distil": {}}


class Idle:
    """Implements everything and changes nothing."""

    @hookimpl(wrapper=True)
    def vtp_encode(self, call: Any, x: Any) -> Iterator[None]:
        return (yield)

    @hookimpl(wrapper=True)
    def vtp_decode(self, call: Any, z: Any) -> Iterator[None]:
        return (yield)

    @hookimpl
    def vtp_build(self, engine: Any) -> None: ...

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Any, metrics: Any) -> None: ...


class Doubled:
    @hookimpl(wrapper=True)
    def vtp_decode(self, z: Any) -> Iterator[None]:
        found = yield
        return {name: 2 * value for name, value in found.items()}


class Zero:
    @hookimpl
    def vtp_encode(self, call: Any, x: Any) -> Any:
        return {name: value * 0 for name, value in call(x).items()}


class Watching:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.steps: list[tuple[int, float]] = []

    @hookimpl
    def vtp_build(self, engine: Any) -> None:
        engine.model.decoder.requires_grad_(False)

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Any, metrics: dict[str, float]) -> None:
        self.steps.append((clock.step, clock.share))
        self.rows.append(metrics)


def test_a_hook_that_does_nothing_leaves_every_number_as_it_was() -> None:
    assert run(engine_of(STACK), 3) == run(engine_of(STACK, hooks={"idle": Idle()}), 3)


def test_hooks_override_and_wrap() -> None:
    seen = []
    engine = engine_of({"read": {"want": "decoded", "aim": 0.0}}, hooks={"doubled": Doubled()})
    plain = engine_of({"read": {"want": "decoded", "aim": 0.0}})
    for each in (plain, engine):
        seen.append(each.step(batch_of(each))["read/distance"])
    assert seen[1] == pytest.approx(4 * seen[0], rel=1e-12)
    empty = engine_of({"read": {"aim": 0.5}}, hooks={"zero": Zero()})
    assert empty.step(batch_of(empty))["read/distance"] == pytest.approx(0.25)


def test_build_comes_before_the_optimizers_and_step_end_with_the_row() -> None:
    hook = Watching()
    engine = engine_of(STACK, hooks={"watching": hook})
    rows = run(engine, 2)
    assert "decoder" not in engine.optimizers.owners
    assert hook.rows == rows
    assert hook.steps == [(0, 0.0), (1, 0.05)]


def test_a_misspelt_hook_is_an_error() -> None:
    class Misspelt:
        @hookimpl
        def vtp_step_ends(self) -> None: ...

    with pytest.raises(
        PluginFault, match=r"hooks.mine: no hook 'vtp_step_ends'; did you mean 'vtp_step_end'"
    ):
        engine_of(STACK, hooks={"mine": Misspelt()})


def test_a_hook_with_an_argument_that_does_not_exist_is_an_error() -> None:
    class Wrong:
        @hookimpl
        def vtp_step_end(self, engine: Any, epoch: int) -> None: ...

    with pytest.raises(PluginFault, match=r"hooks.mine: .*epoch"):
        engine_of(STACK, hooks={"mine": Wrong()})


def test_a_hook_without_its_mark_is_an_error() -> None:
    class Unmarked:
        def vtp_step_end(self, engine: Any) -> None: ...

    with pytest.raises(PluginFault, match="vtp_step_end would never be called; decorate it with @hookimpl"):
        engine_of(STACK, hooks={"mine": Unmarked()})


def test_hooks_stay_outside_of_gradient_modes() -> None:
    class Mode:
        def __init__(self) -> None:
            self.seen: list[bool] = []

        @hookimpl
        def vtp_encode(self, call: Any, x: Any) -> None:
            self.seen.append(torch.is_grad_enabled())

    hook = Mode()
    engine = engine_of({"distil": {}}, hooks={"mode": hook})
    engine.step(batch_of(engine))
    assert sorted(hook.seen) == [False, True]  # the teacher's forward and the student's
