"""Faults of a stack that only its model shows, told with their remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rig import batch_of, engine_of

from vtp_core.errors import DataFault, PluginFault, StackFault
from vtp_core.forwards import Inputs


def test_a_weight_for_a_term_that_is_not_there_is_an_error() -> None:
    engine = engine_of({"rebuild": {"weight": {"l3": 1.0}}})
    with pytest.raises(StackFault, match=r"objectives.rebuild.weight: no term 'l3'; known: l1, l2"):
        engine.step(batch_of(engine))


def test_rows_that_do_not_divide_are_an_error_with_the_nearest_sizes() -> None:
    with pytest.raises(
        StackFault, match=r"0.25 x data.batch_size 10 = 2.5 rows.*use data.batch_size=8 or 12"
    ):
        engine_of({"rebuild": {}, "read": {"rows": 0.25}}, batch=10)
    engine_of({"read": {"rows": 0.333}}, batch=6)  # a third
    with pytest.raises(StackFault, match=r"use data.batch_size=24$"):
        engine_of({"rebuild": {"rows": 0.25}, "read": {"rows": 1 / 3}}, batch=16, train={"accumulate": 2})
    with pytest.raises(StackFault, match=r"use data.batch_size=4 or 8"):  # the whole batch must divide too
        engine_of({"read": {"rows": 0.5}}, batch=6, train={"accumulate": 2})


def test_equal_views_merge_and_unequal_ones_name_both() -> None:
    engine_of({"distil": {}, "masked": {}})
    with pytest.raises(
        StackFault, match=r"'global' is defined differently by objectives.distil and objectives.masked"
    ):
        engine_of({"distil": {}, "masked": {"crops": 3}})
    engine = engine_of({"distil": {}, "masked": {"crops": 3}}, views={"global": {"use": "whole", "crops": 4}})
    assert batch_of(engine).views["global"].shape[1] == 4


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"read": {"view": "image", "mask": "blok"}, "masked": {}}, "no objective brings a mask 'blok'"),
        ({"read": {"source": "teacher:juge"}}, "no 'juge' under 'teachers'; did you mean 'judge'"),
        (
            {"rebuild": {}, "read": {"balance": {"against": "rebild"}}},
            "no other objective 'rebild'; did you mean 'rebuild'",
        ),
        (
            {"read": {"start": 1}, "rebuild": {"balance": {"against": "read"}}},
            "'read' rests at steps when 'rebuild' is active",
        ),
        ({"read": {"critic": {"start": 3}}}, "Read has no critic"),
    ],
)
def test_faults_are_found_before_the_first_step(objectives: dict[str, Any], message: str) -> None:
    with pytest.raises(StackFault, match=message):
        engine_of(objectives, teachers={"judge": {}})


def test_a_batch_without_a_view_says_which() -> None:
    with pytest.raises(DataFault, match="the batch has no 'image'"):
        engine_of({"read": {}}).step(Inputs({}, {}))


def test_an_objective_that_returns_no_scalars_breaks_the_contract() -> None:
    engine = engine_of({"read": {}})
    objective = engine.model.objectives["read"]
    for wrong in ({}, torch.zeros(()), {"a": torch.zeros(3)}, {"a": 1.0}):
        objective.forward = lambda got, clock, wrong=wrong: wrong
        with pytest.raises(PluginFault, match=r"objectives.read: .*scalar"):
            engine.step(batch_of(engine))


def test_an_exception_in_an_objective_names_it() -> None:
    engine = engine_of({"read": {}})

    def broken(got: Any, clock: Any) -> Any:
        raise RuntimeError("shapes differ")

    engine.model.objectives["read"].forward = broken
    with pytest.raises(RuntimeError) as caught:
        engine.step(batch_of(engine))
    assert caught.value.__notes__ == ["in objectives.read (Read), step 0"]


def test_a_block_that_does_not_exist_is_refused_by_its_reader() -> None:
    with pytest.raises(
        StackFault, match=r"objectives.read: it reads hidden:9, and the encoder has blocks 1 to 2"
    ):
        engine_of({"read": {"want": "hidden:9"}})
