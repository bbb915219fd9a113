"""Which steps make the state anew, and what reuse does to a sampling."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import Split, Straight, null
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.ode import Dopri5, Euler, Heun
from vtp_core.samplers.reuse import Reuse, optimal, similarity, uniform
from vtp_core.samplers.sde import EulerMaruyama
from vtp_core.samplers.templates import fitted, states
from vtp_plugins import Spec
from vtp_plugins.errors import StackFault

GOLDEN = Path(__file__).parents[1] / "golden" / "ddt" / "sharing.safetensors"
SPEC, CLOCK, SHAPE, LABELS = Spec(), StepClock(seed=3), (2, 4, 3, 3), torch.tensor([0, 2])


def random_similarity(steps: int) -> Tensor:
    units = torch.nn.functional.normalize(torch.randn(steps, 5).double(), dim=-1)
    return units @ units.T


def error(similarity: Tensor, chosen: tuple[int, ...]) -> float:
    ends = [*chosen, len(similarity)]
    segments = pairwise(ends)
    return sum(float((1 - similarity[begin, begin:end]).sum()) for begin, end in segments)


def field_of(network: Any, reuse: Reuse | None = None, scale: float = 2.0) -> Field:
    return Field(network, Straight(), guidance=Guidance(scale=scale), null=null, reuse=reuse)


@pytest.mark.parametrize("keep", range(1, 9))
def test_the_chosen_steps_have_the_least_error_of_all(keep: int) -> None:
    for _ in range(5):
        found = random_similarity(8)
        every = [(0, *rest) for rest in combinations(range(1, 8), keep - 1)]
        assert optimal(found, keep) == min(every, key=lambda chosen: error(found, chosen))


def test_the_chosen_steps_equal_ddts() -> None:
    stored = load_file(GOLDEN)
    found = similarity(list(stored["in.states"]))
    assert float((found - stored["out.mean_similarity"]).abs().max()) < 5e-6
    assert list(optimal(found, 3)) == stored["out.recompute_timesteps"].tolist()


def test_uniform_steps_are_equally_far_apart() -> None:
    assert uniform(8, 3) == (0, 3, 6)
    assert uniform(8, 8) == tuple(range(8))
    assert uniform(250, 50) == tuple(range(0, 250, 5))
    assert all(len(set(uniform(31, keep))) == keep for keep in range(1, 32))


@pytest.mark.parametrize("sampler", [Euler(SPEC, steps=5), Heun(SPEC, steps=4), EulerMaruyama(SPEC, steps=4)])
def test_reuse_changes_nothing_where_every_step_is_refreshed(sampler: Any) -> None:
    steps = sampler.levels.steps
    plain = sampler(field_of(Split()), SHAPE, LABELS, CLOCK)
    for reuse in (Reuse(keep=steps), Reuse(use="listed", at=tuple(range(steps)))):
        assert torch.equal(sampler(field_of(Split(), reuse), SHAPE, LABELS, CLOCK), plain)


@pytest.mark.parametrize(
    ("sampler", "encoded"),
    [(Euler(SPEC, steps=8), 3), (Heun(SPEC, steps=8), 6), (EulerMaruyama(SPEC, steps=8), 3)],
)
def test_the_encoder_runs_at_the_refreshed_steps_alone(sampler: Any, encoded: int) -> None:
    network = Split()
    field = field_of(network, Reuse(keep=3))
    reused = sampler(field, SHAPE, LABELS, CLOCK)
    assert network.encoded == field.refreshes == encoded
    assert not torch.allclose(reused, sampler(field_of(Split()), SHAPE, LABELS, CLOCK))


def test_optimal_steps_are_found_on_templates() -> None:
    network, sampler = Split(), Euler(SPEC, steps=8)
    field = field_of(network)
    noted = states(sampler, field, SHAPE, LABELS, CLOCK)
    assert len(noted) == 8 and noted[0].shape == (2, 2, 6)
    found = fitted(Reuse(use="optimal", keep=3), sampler, field, SHAPE, LABELS, CLOCK)
    assert found == Reuse(use="listed", at=optimal(similarity(noted), 3))
    assert field.evaluations == 0, "the field itself was sampled"
    sampler(field.reusing(found), SHAPE, LABELS, CLOCK)
    assert fitted(Reuse(keep=3), sampler, field, SHAPE, LABELS, CLOCK) == Reuse(keep=3)


def test_templates_note_one_state_a_step() -> None:
    assert len(states(Heun(SPEC, steps=4), field_of(Split()), SHAPE, LABELS, CLOCK)) == 4


def test_reuse_that_does_not_suit_the_steps_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"sampler.reuse: 9 is more than the sampler's 8 steps"):
        field_of(Split(), Reuse(keep=9)).start(8)
    with pytest.raises(ValueError, match=r"found by .*fitted first"):
        field_of(Split(), Reuse(use="optimal", keep=3)).start(8)
    with pytest.raises(ValueError, match="take 1 to 8"):
        optimal(random_similarity(8), 9)
    pytest.importorskip("torchdiffeq")
    with pytest.raises(ValueError, match="chooses its own steps"):
        Dopri5(SPEC)(field_of(Split(), Reuse(keep=3)), SHAPE, LABELS, CLOCK)


class Stateless(Split):
    """Refuses outputs that it does not have, as the contract's generators do."""

    def forward(
        self, x: Tensor, u: Tensor, condition: Tensor, want: frozenset[str], state: Any = None
    ) -> Any:
        if "state" in want:
            raise LookupError("the generator has no output 'state'")
        return super().forward(x, u, condition, want)


def test_a_generator_without_a_state_is_refused_with_the_remedy() -> None:
    with pytest.raises(StackFault, match=r"sampler.reuse: .*keeps no state, drop reuse"):
        Euler(SPEC, steps=4)(field_of(Stateless(), Reuse(keep=2)), SHAPE, LABELS, CLOCK)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"keep": 0},
        {"use": "listed", "at": [1, 2]},
        {"use": "listed", "at": [0], "keep": 1},
        {"keep": 2, "at": [0]},
    ],
)
def test_wrong_reuse_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Reuse.model_validate(wrong)
