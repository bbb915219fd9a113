"""Needs are data: checked when written, compared by value."""

from __future__ import annotations

import dataclasses

import pytest

from vtp_plugins import Need, Outputs


def test_one_output_may_be_a_string() -> None:
    assert Need("image", "cls").want == frozenset({"cls"})
    assert Need("image", "cls") == Need("image", ["cls"]) == Need("image", {"cls"})


def test_a_need_has_the_contracts_defaults() -> None:
    need = Need("image", "cls")
    assert (need.source, need.mask, need.drop, need.mode) == ("student", "any", None, "train")
    assert (need.through, need.cut, need.draw) == ((), (), "main")


def test_equal_needs_are_one_key() -> None:
    one = Need("image", ["cls", "patches"], through=["generator"], cut=("latent",))
    two = Need("image", ("patches", "cls"), through=("generator",), cut=["latent"])
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two, Need("image", "cls")}) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"view": "other"}, {"want": "patches"}, {"source": "ema"}, {"mask": None}, {"drop": 0.0},
        {"mode": "eval"}, {"through": ("decoder",)}, {"cut": ("latent",)}, {"draw": "second"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_field_counts(change: dict[str, object]) -> None:
    assert Need(**{"view": "image", "want": "cls", **change}) != Need("image", "cls")  # type: ignore[arg-type]


def test_a_need_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Need("image", "cls").view = "other"  # type: ignore[misc]
    assert dataclasses.replace(Need("image", "cls"), draw="x") == Need("image", "cls", draw="x")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"want": []}, "'want' is empty"),
        ({"mode": "test"}, "mode is 'train' or 'eval', not 'test'"),
        ({"source": "teacher"}, "source 'teacher' is none of student, ema, generator, teacher:<name>"),
        ({"source": "EMA"}, "source 'EMA'"),
        ({"source": ""}, "source ''"),
    ],
)
def test_a_need_that_makes_no_sense_is_told_with_its_view(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as fault:
        Need(**{"view": "global", "want": "cls", **keys})  # type: ignore[arg-type]
    assert "Need('global')" in str(fault.value)


@pytest.mark.parametrize("source", ["student", "ema", "generator", "teacher:lite0"])
def test_the_sources_of_the_contract(source: str) -> None:
    assert Need("image", "cls", source=source).source == source


def test_outputs_are_read_by_name() -> None:
    got = Outputs({"cls": 1, "patches@block": 2})
    assert got["cls"] == 1
    assert "patches@block" in got
    assert "patches" not in got
    assert (got.mask, got.grid) == (None, ())


def test_an_output_that_was_not_asked_for_is_told() -> None:
    with pytest.raises(
        LookupError, match=r"output 'latent' was not asked for; the need wants \['cls', 'patches'\]"
    ):
        Outputs({"patches": 1, "cls": 2})["latent"]
