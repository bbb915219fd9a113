"""What is not finite is found before anything moves, and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import batch_of, close, engine_of, run, weights

from vtp_core.errors import NonFinite

OTHERS: dict[str, Any] = {"rebuild": {}, "distil": {}, "fool": {}}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_nothing_moves_and_the_objective_is_named(gradient: bool, order: str) -> None:
    engine = engine_of(
        {**OTHERS, "fool": {"critic": {"order": order}}, "sick": {"at": 2, "gradient": gradient}}
    )
    run(engine, 2)
    before = weights(engine)
    named = r"sick \(gradient\)" if gradient else "sick/sick"
    with pytest.raises(
        NonFinite, match=rf"step 2: not finite: {named}; no weight has moved.*weight of 'sick'"
    ):
        engine.step(batch_of(engine, 2))
    close(weights(engine), before, 0)
    assert engine.steps_done == 2
    assert not any(objective.pending for objective in engine.model.objectives.values())
    assert all(p.grad is None for module in engine.model.modules().values() for p in module.parameters())


def test_a_step_that_was_stopped_can_be_left_out() -> None:
    """The caller may drop the culprit and go on from the very same state."""
    engine, healthy = engine_of({**OTHERS, "sick": {"at": 1}}), engine_of({**OTHERS, "sick": {"at": 99}})
    run(engine, 1)
    run(healthy, 1)
    with pytest.raises(NonFinite):
        engine.step(batch_of(engine, 1))
    engine.model.objectives["sick"].at = 99
    assert run(engine, 2, first=1) == run(healthy, 2, first=1)


def test_a_critic_alone_is_named() -> None:
    engine = engine_of({"rebuild": {}, "fool": {}})
    objective = engine.model.objectives["fool"]
    critique = objective.critique
    objective.critique = lambda got, clock: {"sick": (critique(got, clock)["fake"] * 0).sqrt()}
    before = weights(engine)
    with pytest.raises(NonFinite, match=r"fool \(gradient of its critic\)"):
        engine.step(batch_of(engine))
    close(weights(engine), before, 0)


def test_a_fresh_critic_does_not_move() -> None:
    engine = engine_of({"rebuild": {}, "fool": {"critic": {"input": "fresh"}}})
    objective = engine.model.objectives["fool"]
    objective.critique = lambda got, clock: {"sick": objective.critic[0].weight.sum() * torch.nan}
    before = objective.critic[0].weight.clone()
    with pytest.raises(NonFinite, match=r"fresh critic of objectives.fool is not finite and has not moved"):
        engine.step(batch_of(engine))
    assert torch.equal(objective.critic[0].weight, before)


def test_settle_comes_once_a_step_after_the_check_and_before_the_optimizers() -> None:
    engine = engine_of({"sick": {"at": 99, "repeat": 2}}, train={"accumulate": 2})
    events: list[str] = []
    objective: Any = engine.model.objectives["sick"]
    for owner, name in (
        (engine, "_checked"),
        (objective, "settle"),
        (engine.optimizers, "step"),
        (engine.ema, "update"),
    ):
        method = getattr(owner, name)

        def noted(*args: Any, method: Any = method, name: str = name) -> Any:
            events.append(name)
            return method(*args)

        setattr(owner, name, noted)
    run(engine, 2)
    assert events == ["_checked", "settle", "step", "update"] * 2
    assert objective.seen == 2
