"""Continuous paths and the laws of their levels against SiT, LightningDiT, DDT and RAE."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_flow import GVP, VP, Linear
from vtp_flow.laws import Law, Levels, shifted
from vtp_plugins import Spec

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = Spec(channels=4)
PATHS = {"Linear": Linear, "GVP": GVP, "VP": VP}
ALL = pytest.mark.parametrize("cls", PATHS.values())


def close(ours: Any, stored: Tensor, most: float) -> None:
    """Within the absolute tolerance that the golden set's README gives."""
    ours = torch.as_tensor(ours, dtype=torch.float64).reshape(stored.shape)
    assert float((ours - stored.double()).abs().max()) <= most


# ---- values


@pytest.mark.parametrize("name", PATHS)
def test_coefficients_mixtures_and_velocities_equal_sits(name: str) -> None:
    """SiT's t runs from noise to data: u = 1 - t, and everything that is a derivative changes its sign."""
    stored = load_file(GOLDEN / "sit" / "paths.safetensors")
    path, key, u = PATHS[name](SPEC), f"out.{name}.", 1 - stored["in.t"]
    alpha, sigma, d_alpha, d_sigma = path.coefficients(u)
    close(alpha, stored[key + "alpha"], 2e-6)
    close(sigma, stored[key + "sigma"], 2e-6)
    close(-d_alpha, stored[key + "d_alpha"], 5e-6)
    close(-d_sigma, stored[key + "d_sigma"], 5e-6)
    close(-d_alpha / alpha, stored[key + "d_alpha_over_alpha"], 1e-4)
    data, noise = stored["in.x1"], stored["in.x0"]
    close(path.mix(data, noise, u), stored[key + "xt"], 1e-5)
    close(-path.target(data, noise, u), stored[key + "ut"], 2e-5)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_equal_sits(name: str) -> None:
    stored = load_file(GOLDEN / "sit" / "paths.safetensors")
    path, key, u = PATHS[name](SPEC), f"out.{name}.", 1 - stored["in.t"]
    x = stored[key + "xt"]
    close(path.convert(-stored["in.v"], x, u, "score"), stored[key + "score_from_velocity"], 5e-5)
    close(path.convert(-stored["in.v"], x, u, "noise"), stored[key + "noise_from_velocity"], 1e-5)
    score = stored[key + "score_from_velocity"]
    close(-path.convert(score, x, u, "velocity", "score"), stored[key + "velocity_from_score"], 1e-4)
    close(path.convert(-stored[key + "ut"], x, u, "score"), stored[key + "score_of_true_velocity"], 1e-4)


@pytest.mark.parametrize("name", ["Linear", "GVP"])
def test_mixtures_and_scores_equal_raes_whose_time_runs_as_ours(name: str) -> None:
    stored = load_file(GOLDEN / "dit_dh" / "loss.safetensors")
    path, key, u = PATHS[name](SPEC), f"out.{name}.", stored["in.t"]
    data, noise = stored["in.x1"], stored["in.x0"]
    close(path.mix(data, noise, u), stored[key + "xt"], 1e-5)
    close(path.target(data, noise, u), stored[key + "ut"], 2e-5)
    close(path.convert(stored["out.pred"], stored[key + "xt"], u, "score"), stored[key + "score"], 2e-4)


@pytest.mark.parametrize("name", PATHS)
def test_levels_are_drawn_where_sit_draws_them(name: str) -> None:
    stored = load_file(GOLDEN / "sit" / "paths.safetensors")
    for predicts in ("velocity", "noise", "score"):
        path = PATHS[name](SPEC, predicts=predicts)
        first, last = stored[f"out.{name}.interval.{predicts}"][0].tolist()  # row 0: training
        assert path.levels.within == pytest.approx((1 - last, 1 - first), abs=1e-9)


# ---- what must hold of any path


@ALL
def test_derivatives_are_derivatives(cls: Any) -> None:
    u = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    path, step = cls(SPEC), 1e-6
    alpha, _, d_alpha, d_sigma = path.coefficients(u)
    after, before = path.coefficients(u + step), path.coefficients(u - step)
    torch.testing.assert_close((after[0] - before[0]) / (2 * step), d_alpha, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close((after[1] - before[1]) / (2 * step), d_sigma, rtol=1e-7, atol=1e-8)
    assert alpha.dtype == torch.float64
    assert path.coefficients(u.bfloat16())[0].dtype == torch.float32


@ALL
def test_each_of_four_meanings_gives_the_other_three(cls: Any) -> None:
    data, noise = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    u = torch.linspace(0.02, 0.98, 5, dtype=torch.float64)
    meanings = ("velocity", "noise", "data", "score")
    truth = {one: cls(SPEC, predicts=one).target(data, noise, u) for one in meanings}
    path = cls(SPEC)
    x = path.mix(data, noise, u)
    for given in meanings:
        for to in meanings:
            made = path.convert(truth[given], x, u, to, given)
            torch.testing.assert_close(made, truth[to], rtol=1e-9, atol=1e-9)


def test_one_level_serves_all_rows() -> None:
    data, noise = torch.randn(2, 5, 4, 2, 2)
    path = Linear(SPEC, predicts="data")
    one, each = torch.tensor([0.3]), torch.full((5,), 0.3)
    assert torch.equal(path.mix(data, noise, one), path.mix(data, noise, each))
    for to in ("velocity", "noise", "score"):
        assert torch.equal(path.convert(data, noise, one, to), path.convert(data, noise, each, to))


def test_a_velocity_gives_data_and_noise_at_both_ends() -> None:
    data, noise = torch.randn(2, 2, 4, 2, 2)
    for cls in (Linear, GVP):
        path = cls(SPEC)
        for u in (torch.zeros(1), torch.ones(1)):
            x, velocity = path.mix(data, noise, u), path.target(data, noise, u)
            torch.testing.assert_close(path.convert(velocity, x, u, "data"), data)
            torch.testing.assert_close(path.convert(velocity, x, u, "noise"), noise)


def test_an_unknown_meaning_is_refused() -> None:
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="'flow' is none of velocity, noise, data, score"):
        Linear(SPEC).convert(x, x, torch.ones(1), "flow")


# ---- laws of the level


def test_logit_normal_levels_equal_lightningdits() -> None:
    """Its mean is of data time: ours has the other sign."""
    stored = load_file(GOLDEN / "lightningdit" / "time.safetensors")
    draws = torch.special.ndtr(stored["in.std_normals"].double())
    close(Law("logit_normal").level(draws), stored["out.logit_normal_upstream"], 2e-6)
    for number, (mu, sigma) in enumerate(stored["out.lognorm_mu_sigma"].tolist()):
        u = Law("logit_normal", -mu, sigma).level(1 - draws)
        close(1 - u, stored[f"out.logit_normal_fork_{number}"], 2e-6)


def test_a_shifted_grid_equals_lightningdits() -> None:
    stored = load_file(GOLDEN / "lightningdit" / "time.safetensors")
    for number, shift in enumerate((0.3, 0.075, 0.15)):
        for index, points in enumerate((10, 25)):
            t = 1 - shifted(1 - torch.linspace(0, 1, points), 1 / shift)
            close(t, stored[f"out.grid.shift{number}.points{index}"], 2e-6)


def test_levels_and_shift_equal_raes() -> None:
    stored = load_file(GOLDEN / "dit_dh" / "time.safetensors")
    spec = Spec(channels=768, size=(256, 256), patch=(16, 16))
    laws: list[dict[str, Any]] = [
        {},
        {"law": "logit_normal"},
        {"law": "logit_normal", "mu": -0.5, "sigma": 1.2},
    ]
    for number, law in enumerate(laws):
        for shift, key in ((1.0, "unshifted"), ("from_latent", "shifted")):
            path = Linear(spec, **law, shift=shift, within=(0.0, 0.999))
            close(path.levels.at(stored["in.u"], 0.5), stored[f"out.train_t.{number}.{key}"], 2e-6)
    assert path.levels.shift == pytest.approx(float(stored["out.shift"][0]), abs=1e-8)
    smaller = Linear(Spec(channels=192, size=(256, 256), patch=(16, 16)), shift="from_latent")
    assert smaller.levels.shift == pytest.approx(float(stored["out.shift"][1]), abs=1e-8)
    grid = 1 - torch.linspace(0, 0.999, 50)
    close(shifted(grid, path.levels.shift), stored["out.ode_grid.50.train_shift"], 2e-6)


def test_a_shifted_logit_normal_is_one_of_another_mean() -> None:
    """Shift a moves the mean by log a."""
    draws = torch.linspace(0.01, 0.99, 99)
    moved = Levels((Law("logit_normal", 0.2, 0.7),), shift=3.0).at(draws, 0.0)
    close(moved, Law("logit_normal", 0.2 + math.log(3), 0.7).level(draws), 1e-6)


def test_a_law_within_a_range_is_the_law_of_what_falls_in_it() -> None:
    law = Law("logit_normal", 0.3, 0.8)
    everything = law.level(torch.linspace(0.0005, 0.9995, 1000))
    kept = everything[(everything >= 0.2) & (everything <= 0.6)]
    draws = (torch.arange(len(kept)) + 0.5) / len(kept)
    close(law.level(draws, 0.2, 0.6), kept, 2e-3)
    ends = law.level(torch.tensor([0.0, 1.0]), 0.2, 0.6)
    close(ends, torch.tensor([0.2, 0.6]), 1e-7)


def test_laws_follow_each_other_over_the_run() -> None:
    laws = [Law("logit_normal", until=0.6), Law("uniform")]
    path = Linear(SPEC, laws=laws)
    early, late = (path.draw("u", 64, StepClock(step=step, steps=100)).double() for step in (59, 60))
    for step, found, law in ((59, early, laws[0]), (60, late, laws[1])):
        close(found, law.level(StepClock(step=step, steps=100).uniform("u", 64)), 1e-7)


@ALL
def test_draws_come_from_the_clock_and_stay_within(cls: Any) -> None:
    path = cls(SPEC, law="logit_normal", sigma=3.0, within=(0.1, 0.9))
    u = path.draw("u", 256, StepClock(step=2))
    assert u.dtype == torch.float32
    assert torch.equal(u, path.draw("u", 256, StepClock(step=2)))
    assert not torch.equal(u, path.draw("u", 256, StepClock(step=3)))
    assert float(u.min()) >= 0.1
    assert float(u.max()) <= 0.9
    dealt = [path.draw("u", 128, StepClock(step=2, world=2, rank=rank)) for rank in range(2)]
    assert torch.equal(torch.stack(dealt, 1).flatten(), u)  # row i belongs to process i mod 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "beta"}, "law: 'beta'"),
        ({"sigma": 0.0}, "sigma: 0.0"),
        ({"shift": 0.0}, "shift: 0.0"),
        ({"shift": "latent"}, "shift: 'latent' is neither a number nor from_latent"),
        ({"shift": "from_latent", "shift_base": 0}, "shift_base above 0"),
        ({"within": (0.5, 0.5)}, "within: "),
        ({"predicts": "v"}, "predicts: 'v'"),
        ({"laws": [Law(), Law()]}, "needs 'until'"),
        ({"laws": [Law(until=0.5), Law(until=0.4), Law()]}, "that rises"),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(SPEC, **options)


def test_a_law_of_no_share_of_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"until: 1\.5"):
        Law(until=1.5)


def test_a_shift_from_the_latent_needs_one() -> None:
    with pytest.raises(ValueError, match="needs a bottleneck's channels"):
        Linear(Spec(), shift="from_latent")
