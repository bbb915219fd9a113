"""Samplers on fields whose solutions are known, and how many evaluations they take."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from closed_form import Given, Noisy, Normal, Split, Straight, null
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.samplers.ddpm import DDIM, DDPM
from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.levels import Levels
from vtp_core.samplers.ode import Dopri5, Euler, Heun
from vtp_core.samplers.sde import EulerMaruyama
from vtp_plugins import Spec

SPEC, CLOCK = Spec(), StepClock(seed=1)
LABELS = torch.tensor([0, 2])
SHAPE = (2, 4, 3, 3)


def solved(clock: StepClock = CLOCK) -> Tensor:
    """Where the exact flow of Normal's data takes the clock's noise."""
    means = torch.tensor([-1.0, 2.0]).view(-1, 1, 1, 1)
    return means + 0.5 * clock.normal("noise", *SHAPE)


def off(x: Tensor) -> float:
    return float((x - solved()).abs().max())


# ---- levels


def test_shift_is_the_same_in_its_three_spellings() -> None:
    u = Levels(10, shift=1 / 0.3).of(SHAPE)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(1 - u, 0.3 * t / (1 + (0.3 - 1) * t))  # LightningDiT
    u = Levels(10, shift=2.5, last_step=0.04).of(SHAPE)
    t = torch.cat([torch.linspace(0, 0.96, 10, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(1 - u, t / (t + (1 - t) * 2.5))  # DDT
    u = Levels(7, shift="from_latent", end=0.001).of((1, 768, 16, 16))
    a, t = math.sqrt(768 * 256 / 4096), 1 - torch.linspace(0, 0.999, 8, dtype=torch.float64)
    torch.testing.assert_close(u, a * t / (1 + (a - 1) * t))  # RAE
    assert float(u[0]) == 1.0 and 0.0068 < float(u[-1]) < 0.0070


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"shift": -1.0}, "shift"),
        ({"shift": "latent"}, "shift"),
        ({"start": 0.2, "end": 0.3}, "start"),
        ({"last_step": 0.0}, "last_step"),
    ],
)
def test_wrong_levels_are_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        Euler(SPEC, **{"steps": 4, **wrong})


# ---- evaluations


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (Euler(SPEC, steps=6), 6),
        (Euler(SPEC, steps=6, last_step=0.04), 6),
        (Heun(SPEC, steps=6), 12),
        (Heun(SPEC, steps=6, last="euler"), 11),
        (EulerMaruyama(SPEC, steps=6), 6),
        (EulerMaruyama(SPEC, steps=6, last="tweedie"), 6),
        (EulerMaruyama(SPEC, steps=6, last="euler"), 6),
        (EulerMaruyama(SPEC, steps=6, last="none"), 6),
        (EulerMaruyama(SPEC, steps=6, method="heun"), 11),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_evaluations_are_counted(sampler: Any, evaluations: int, scale: float) -> None:
    network = Normal()
    field = Field(network, Straight(), guidance=Guidance(scale=scale), null=null)
    x = sampler(field, SHAPE, LABELS, CLOCK)
    assert x.shape == SHAPE and x.isfinite().all() and not x.requires_grad
    assert field.evaluations == len(network.calls) == evaluations
    assert set(network.rows) == {2 if scale == 1 else 4}


def test_dopri5_counts_what_it_takes() -> None:
    pytest.importorskip("torchdiffeq")
    field = Field(Normal(), Straight())
    Dopri5(SPEC)(field, SHAPE, LABELS, CLOCK)
    assert field.evaluations % 6 == 2  # two to begin with, six a step


@pytest.mark.parametrize("kind", [Euler, Heun, Dopri5, EulerMaruyama])
def test_samplers_take_generators_with_a_path(kind: Any) -> None:
    assert kind.kind == "path"


# ---- solutions


def test_euler_and_heun_converge_to_the_solution_at_their_orders() -> None:
    errors = {
        kind: [off(kind(SPEC, steps=n)(Field(Normal(), Straight()), SHAPE, LABELS, CLOCK)) for n in (64, 128)]
        for kind in (Euler, Heun)
    }
    assert errors[Euler][0] / errors[Euler][1] == pytest.approx(2, rel=0.15)
    assert errors[Heun][0] / errors[Heun][1] == pytest.approx(4, rel=0.3)
    assert errors[Heun][1] < 1e-3 < errors[Euler][1] < 0.05


def test_dopri5_converges_to_the_solution() -> None:
    pytest.importorskip("torchdiffeq")
    x = Dopri5(SPEC, rtol=1e-6, atol=1e-6)(Field(Normal(), Straight()), SHAPE, LABELS, CLOCK)
    assert off(x) < 1e-4


def test_one_euler_step_by_hand() -> None:
    x = Euler(SPEC, steps=1)(Field(Normal(), Straight()), SHAPE, LABELS, CLOCK)
    noise = CLOCK.normal("noise", *SHAPE)
    torch.testing.assert_close(x, noise - Normal()(noise, torch.ones(1), LABELS)["prediction"])


@pytest.mark.parametrize("diffusion", ["constant", "sigma", "linear", "decreasing", "inc-dec", "sbdm"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_every_diffusion_keeps_the_law_of_the_data(diffusion: Any, method: Any) -> None:
    start = 0.99 if diffusion == "sbdm" else 1.0
    sampler = EulerMaruyama(
        SPEC, steps=100, diffusion=diffusion, norm=0.7, start=start, method=method, last="euler"
    )
    labels = torch.full((4000,), 2)
    x = sampler(Field(Normal(), Straight()), (4000, 1, 2, 2), labels, CLOCK)
    assert float(x.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(x.std()) == pytest.approx(0.5, abs=0.03)


def test_a_step_of_the_stochastic_equation_by_hand() -> None:
    noise, draw = CLOCK.normal("noise", *SHAPE), torch.randn(SHAPE)
    field = Field(Normal(), Straight())
    sampler = EulerMaruyama(SPEC, steps=2, last="none", norm=0.8)
    seen = Given(seed=1, draws={"step0": draw, "step1": torch.zeros(SHAPE)})
    x = sampler(field, SHAPE, LABELS, seen)
    v, s = field.velocity(noise, torch.ones(1), LABELS), -noise
    middle = noise - 0.5 * v + 0.5 * 0.8 * s + math.sqrt(2 * 0.8 * 0.5) * draw
    half = torch.full((1,), 0.5)
    v, s = field.velocity(middle, half, LABELS), field.score(middle, half, LABELS)
    torch.testing.assert_close(x, middle - 0.5 * v + 0.5 * 0.4 * s)


def test_last_steps_by_hand() -> None:
    draws = {"noise": CLOCK.normal("noise", *SHAPE)}
    field, u = Field(Normal(), Straight()), torch.full((1,), 0.04)

    def ended(**options: Any) -> Tensor:
        return EulerMaruyama(SPEC, steps=3, **options)(field, SHAPE, LABELS, Given(seed=1, draws=draws))

    # one Euler-Maruyama integration to 0.04, by itself
    before = EulerMaruyama(SPEC, steps=2, last="none", end=0.04)(
        field, SHAPE, LABELS, Given(seed=1, draws=draws)
    )
    v, s = field.velocity(before, u, LABELS), field.score(before, u, LABELS)
    torch.testing.assert_close(ended(last="mean"), before - 0.04 * v + 0.04**2 * s)
    torch.testing.assert_close(ended(last="euler"), before - 0.04 * v)
    torch.testing.assert_close(ended(last="tweedie"), before / 0.96 + 0.04**2 / 0.96 * s)


def test_the_same_seed_gives_the_same_samples_and_another_gives_others() -> None:
    def samples(seed: int) -> Tensor:
        return EulerMaruyama(SPEC, steps=4)(Field(Normal(), Straight()), SHAPE, LABELS, StepClock(seed=seed))

    assert torch.equal(samples(1), samples(1))
    assert not torch.allclose(samples(1), samples(2))


def test_a_sample_does_not_depend_on_the_batch() -> None:
    for sampler in (Euler(SPEC, steps=4), Heun(SPEC, steps=3), EulerMaruyama(SPEC, steps=4)):
        field = Field(Normal(), Straight(), guidance=Guidance(scale=2.0), null=null)
        both = sampler(field, SHAPE, LABELS, CLOCK)
        torch.testing.assert_close(both[:1], sampler(field, (1, *SHAPE[1:]), LABELS[:1], CLOCK))


def test_heun_decides_on_guidance_where_a_step_begins() -> None:
    network = Normal()
    field = Field(network, Straight(), guidance=Guidance(scale=2.0, interval=(0.0, 0.7)), null=null)
    Heun(SPEC, steps=5, last="euler")(field, SHAPE, LABELS, CLOCK)  # 1, 0.8, 0.6, 0.4, 0.2
    assert network.rows == [2, 2, 2, 2, 4, 4, 4, 4, 4]


# ---- what is refused


@pytest.mark.parametrize("kind", [Euler, Heun, Dopri5, EulerMaruyama])
def test_a_path_without_velocities_is_refused_early(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=r"sampler.use: .* follows velocities; path: noisy has no velocities"
    ):
        kind(Spec(path=Noisy()))
    with pytest.raises(ValueError, match="follows velocities"):
        kind(SPEC)(Field(Normal(), Noisy()), SHAPE, LABELS, CLOCK)


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_a_continuous_path_is_refused_where_a_chain_is_stepped(kind: Any) -> None:
    assert kind.kind == "path" and kind(SPEC)
    with pytest.raises(ValueError, match=r"discrete path; take generator.path.use: ddpm"):
        kind(Spec(path=Straight()))
    with pytest.raises(ValueError, match="discrete path"):
        kind(SPEC)(Field(Normal(), Straight()), SHAPE, LABELS, CLOCK)


def test_a_missing_torchdiffeq_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ValueError, match="pip install torchdiffeq"):
        Dopri5(SPEC)


def test_an_infinite_diffusion_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="sbdm is infinite at level 1"):
        EulerMaruyama(SPEC, steps=4, diffusion="sbdm")(Field(Normal(), Straight()), SHAPE, LABELS, CLOCK)


def test_a_score_at_no_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="heun evaluates at end"):
        EulerMaruyama(SPEC, steps=4, method="heun", last="none")


def test_networks_of_their_own_precision_are_sampled_in_the_state_s() -> None:
    draws = {"noise": torch.randn(SHAPE, dtype=torch.float64)}
    x = Euler(SPEC, steps=3)(Field(Split(), Straight()), SHAPE, LABELS, Given(draws=draws))
    assert x.dtype == torch.float64
