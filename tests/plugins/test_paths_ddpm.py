"""The discrete process against DiT's: tables, respacing, posteriors, learned variance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_flow import DDPM
from vtp_flow.chain import Chain, strided
from vtp_plugins import Spec

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"
SPEC = Spec(channels=4)
TABLES = {
    "timestep_map": "times",
    "betas": "betas",
    "alphas_cumprod": "cumulative",
    "posterior_variance": "posterior_variance",
    "posterior_log_variance_clipped": "posterior_log_variance",
    "posterior_mean_coef1": "posterior_data",
    "posterior_mean_coef2": "posterior_noised",
}


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.double() - stored.double()).abs().max())


def test_the_tables_of_whole_and_respaced_processes_equal_dits() -> None:
    stored, path = load_file(GOLDEN / "schedule.safetensors"), DDPM(SPEC)
    chains: dict[str, Chain] = {
        "full": path.chain,
        "respace": path.respaced(25),
        "loop": path.respaced(10),
        "ddim": path.respaced(10, "stride"),
        "sections": path.respaced([10, 5, 3]),
    }
    read = 0
    for key, value in stored.items():
        _, chain, table = (*key.split("."), "")[:3]
        if chain in chains:
            ours = getattr(chains[chain], TABLES[table])
            assert ours.dtype == value.dtype
            assert torch.equal(ours, value) if table == "timestep_map" else off(ours, value) < 1e-11
            read += 1
    assert read == 22
    assert off(DDPM(SPEC, schedule="cosine").chain.betas, stored["out.cosine.betas"]) < 1e-12


def test_mixtures_posteriors_and_the_reverse_step_equal_dits() -> None:
    stored, path = load_file(GOLDEN / "diffusion.safetensors"), DDPM(SPEC)
    data, noise, index = stored["in.x_start"], stored["in.noise"], stored["in.t"]
    u = ((index + 1) / 1000).float()
    assert torch.equal(path.index(u), index)
    x = stored["out.q_sample"]
    assert off(path.mix(data, noise, u), x) < 1e-5
    assert off(path.chain.noised(data, noise, index), x) < 1e-5
    mean, log_variance = path.chain.posterior(data, x, index)
    assert off(mean, stored["out.q_posterior.mean"]) < 1e-5
    assert off(log_variance.expand_as(mean), stored["out.q_posterior.log_variance_clipped"]) < 2e-5
    prediction, variance = stored["out.model_output"].chunk(2, 1)
    mean, log_variance, aim = path.chain.reverse(prediction, x, index, variance)
    assert off(mean, stored["out.p.mean"]) < 1e-5
    assert off(log_variance, stored["out.p.log_variance"]) < 5e-5
    assert off(log_variance.exp(), stored["out.p.variance"]) < 5e-7
    assert off(aim, stored["out.p.pred_xstart"]) < 5e-3
    assert off(path.convert(prediction, x, u, "data"), stored["out.p.pred_xstart"]) < 5e-3


def test_every_level_meets_its_own_timestep() -> None:
    path = DDPM(SPEC)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(path.index(path.chain.levels.to(dtype)), path.chain.times)
    alpha, sigma, _, _ = path.coefficients(torch.zeros(1))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)
    respaced = path.respaced(25)
    assert off(path.coefficients(respaced.levels)[0] ** 2, respaced.cumulative) < 1e-12


def test_draws_are_timesteps_each_as_likely() -> None:
    path = DDPM(SPEC, timesteps=4, betas=(1e-5, 1e-3))
    u = path.draw("u", 4096, StepClock())
    found, counts = u.unique(return_counts=True)
    assert found.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert counts.min() > 900
    assert DDPM(SPEC).draw("u", 8, StepClock()).gt(0).all()


def test_noise_data_and_score_give_each_other_and_no_velocity() -> None:
    data, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    u = torch.tensor([0.001, 0.4, 1.0], dtype=torch.float64)
    path = DDPM(SPEC)
    x = path.mix(data, noise, u)
    for meaning in ("noise", "data", "score"):
        truth = DDPM(SPEC, predicts=meaning).target(data, noise, u)
        torch.testing.assert_close(path.convert(noise, x, u, meaning), truth)
        torch.testing.assert_close(path.convert(truth, x, u, "data", meaning), data)
    with pytest.raises(ValueError, match="sample it with ddpm or ddim"):
        path.convert(noise, x, u, "velocity")


def test_a_step_of_the_process_undoes_itself_given_the_noise() -> None:
    data, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    chain = DDPM(SPEC).respaced(7)
    x = chain.noised(data, noise, 4)
    torch.testing.assert_close(chain.data(x, noise, 4), data)
    torch.testing.assert_close(chain.noise(x, data, 4), noise)
    assert chain.reverse(noise, x, 4, clip=0.5)[2].abs().max() <= 0.5
    rows = torch.full((3,), 4)
    torch.testing.assert_close(chain.reverse(noise, x, rows)[0], chain.reverse(noise, x, 4)[0])


def test_fixed_variances_are_the_ends_of_the_learned_one() -> None:
    x = torch.randn(2, 4, 2, 2)
    chain = DDPM(SPEC).chain
    for fixed, learned in (("small", -1.0), ("large", 1.0)):
        stays = chain.reverse(x, x, 500, fixed=fixed)[1]  # type: ignore[arg-type]
        assert torch.allclose(stays, chain.reverse(x, x, 500, torch.full_like(x, learned))[1])


def test_the_slope_of_the_tables_is_that_of_the_diffusion() -> None:
    """Between levels d log alpha / du is about -T beta / 2."""
    path = DDPM(SPEC)
    alpha, sigma, d_alpha, d_sigma = path.coefficients(path.chain.levels[1:])
    torch.testing.assert_close(d_alpha / alpha, -500 * path.chain.betas[1:], rtol=2e-2, atol=0)
    torch.testing.assert_close(sigma * d_sigma, -alpha * d_alpha, rtol=0.5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicts": "velocity"}, "predicts: ddpm predicts noise, data or score"),
        ({"timesteps": 1}, "timesteps: 1"),
        ({"betas": (0.02, 1.0)}, "betas: "),
        ({"timesteps": 10}, "betas: "),
    ],
)
def test_senseless_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPM(SPEC, **options)


def test_impossible_spacings_are_refused() -> None:
    with pytest.raises(ValueError, match="spacing: even"):
        DDPM(SPEC).respaced(300, "stride")
    with pytest.raises(ValueError, match="take 1 to 500"):
        DDPM(SPEC).respaced([501, 3])
    assert strided(1000, 8).tolist() == list(range(0, 1000, 125))
