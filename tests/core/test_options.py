"""The engine's own keys: steps, ranges, defaults."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from vtp_core import options
from vtp_core.options import steps_of

MODELS = [
    model for model in vars(options).values() if isinstance(model, type) and issubclass(model, options._Keys)
]


@pytest.mark.parametrize(
    ("value", "steps", "expected"),
    [
        (0, 1000, 0),
        (7, 1000, 7),
        (2000, 1000, 2000),
        ("0%", 1000, 0),
        ("37.5%", 1000, 375),
        ("100%", 1000, 1000),
        ("5%", 10, 0),
        ("20%", 7, 1),
        ("50.%", 4, 2),
    ],
)
def test_steps_of_a_number_or_a_share(value: int | str, steps: int, expected: int) -> None:
    assert steps_of(value, steps) == expected


@pytest.mark.parametrize(
    "value", ["5", "x%", "-5%", "100.1%", "5 %", "", -1, 0.5, float("inf"), float("nan"), True, None, [1]]
)
def test_what_is_no_step(value: object) -> None:
    with pytest.raises(ValidationError, match="a step is a number of steps, or a share of the run") as fault:
        options.Optim.model_validate({"warmup": value})
    assert fault.value.error_count() == 1


def test_a_whole_float_is_a_number_of_steps() -> None:
    assert options.Optim.model_validate({"warmup": 1e3}).warmup == 1000


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_refuses_unknown_keys_and_has_valid_defaults(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        model.model_validate({"no_such_key": 1})
    needed = {name: "x" for name, field in model.model_fields.items() if field.is_required()}
    built = model.model_validate(needed)
    assert model.model_validate(built.model_dump()) == built


def test_a_number_is_finite() -> None:
    for key in ("lr", "eps", "weight_decay"):
        with pytest.raises(ValidationError, match="finite"):
            options.Optim.model_validate({key: float("inf")})


def test_a_critic_keeps_its_own_defaults_beside_what_is_written() -> None:
    optim = options.Objective.model_validate({"critic": {"optim": {"lr": 1e-4}}}).critic.optim
    assert optim.lr == 1e-4
    assert (optim.betas, optim.weight_decay, optim.warmup, optim.schedule) == ((0.5, 0.9), 0.0, 0, "constant")
    assert options.Critic().optim == options.CriticOptim()


def test_every_dial_sets_known_keys() -> None:
    for dial in options.DIALS.values():
        options.Optim.model_validate(dial)


def test_what_is_not_built_is_refused() -> None:
    assert options.Train.model_validate({"compile": False})
    with pytest.raises(ValidationError, match="not built yet"):
        options.Train.model_validate({"compile": True})


def test_the_decay_of_an_average_warms_up() -> None:
    assert [options.Ema(decay=0.5).at(step) for step in (0, 2, 8, 1000)] == [0.1, 0.25, 0.5, 0.5]
    assert options.Ema(decay=0.5, warmup=False).at(0) == 0.5
