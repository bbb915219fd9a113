"""The base class: what an objective starts with, and where its EMA copies are."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from vtp_core.clock import StepClock
from vtp_plugins import AdversarialObjective, Objective


class Distil(Objective):
    shadow = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


@pytest.fixture
def bound() -> Distil:
    """An objective as the engine leaves it."""
    objective = Distil()
    objective.bind_shadows({"head": copy.deepcopy(objective.head)})
    return objective


def test_an_objective_starts_empty() -> None:
    objective = Objective()
    assert (objective.needs, objective.views, objective.masks, objective.pending) == ({}, {}, {}, {})
    assert (objective.shadow, objective.exports, objective.coupled) == ((), (), False)


def test_two_objectives_share_no_dict() -> None:
    one, two = Objective(), Objective()
    one.views["x"] = None  # type: ignore[index]
    one.pending["y"] = torch.zeros(())
    assert not two.views
    assert not two.pending


def test_the_copy_is_found_by_name(bound: Distil) -> None:
    assert bound.ema("head") is not bound.head
    assert isinstance(bound.ema("head"), nn.Linear)


def test_a_copy_is_no_submodule(bound: Distil) -> None:
    assert set(bound.state_dict()) == {"head.weight", "head.bias"}
    assert len(list(bound.parameters())) == 2
    assert len(list(bound.modules())) == 2


def test_a_copy_that_is_not_there_is_told(bound: Distil) -> None:
    with pytest.raises(LookupError, match="Distil: no EMA copy of 'tail'; name it in 'shadow'"):
        bound.ema("tail")
    with pytest.raises(LookupError, match="outside an engine call bind_shadows first"):
        Distil().ema("head")


def test_binding_again_replaces_the_copies(bound: Distil) -> None:
    shadows = {"head": nn.Linear(2, 2)}
    bound.bind_shadows(shadows)
    assert bound.ema("head") is shadows["head"]
    shadows.clear()  # the caller's dict is not ours
    assert bound.ema("head")


def test_settling_empties_what_waits() -> None:
    objective = Objective()
    objective.pending["centre"] = torch.zeros(2)
    objective.settle(StepClock())
    assert objective.pending == {}


def test_forward_and_critique_are_the_authors() -> None:
    with pytest.raises(NotImplementedError):
        Objective()({}, StepClock())
    with pytest.raises(NotImplementedError):
        AdversarialObjective().critique({}, StepClock())
    assert issubclass(AdversarialObjective, Objective)


def test_the_stacks_keys_are_not_an_objectives_business() -> None:
    from vtp_core.options import OBJECTIVE_KEYS

    assert not OBJECTIVE_KEYS & set(dir(Objective()))
    assert not OBJECTIVE_KEYS & set(inspect.signature(Objective.forward).parameters)
