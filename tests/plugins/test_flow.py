"""The flow objective against SiT, LightningDiT, DDT, RAE and DiT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_flow import DDPM, GVP, VP, Flow, Linear
from vtp_flow.weighting import weights
from vtp_plugins import Outputs, Spec
from vtp_plugins.testing import SPEC, check_objective

GOLDEN = Path(__file__).parents[1] / "golden"
CLOCK = StepClock()
TINY = Spec(channels=4)


def fed(path: Any, prediction: Tensor, data: Tensor, noise: Tensor, u: Tensor) -> dict[str, Tensor]:
    """What the engine hands over, rows first."""
    known = {"noised": path.mix(data, noise, u), "target": path.target(data, noise, u)}
    return {"prediction": prediction, "clean": data, "noise": noise, "u": u, **known}


def terms(path: Any, values: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The objective on rows (R, ...), one crop."""
    got = {"flow": Outputs({name: value[None] for name, value in values.items()})}
    return Flow(Spec(path=path), **options)(got, CLOCK)


def by_row(path: Any, values: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The terms of every row on its own, (R,)."""
    rows = len(values["u"])
    each = [terms(path, {k: v[i : i + 1] for k, v in values.items()}, **options) for i in range(rows)]
    return {term: torch.stack([one[term] for one in each]).detach() for term in each[0]}


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.detach().double() - stored.double()).abs().max())


# ---- against the systems


@pytest.mark.parametrize(
    ("predicts", "weighting", "most"),
    [
        ("velocity", "none", 2e-5),
        ("noise", "none", 5e-6),
        ("noise", "velocity", 1e-3),
        ("noise", "likelihood", 5e-5),
        ("score", "none", 5e-6),
        ("score", "velocity", 5e-4),
        ("score", "likelihood", 5e-5),
    ],
)
def test_losses_equal_sits(predicts: Any, weighting: str, most: float) -> None:
    """SiT's velocity is ours with the other sign, its noise and its score are ours."""
    stored = load_file(GOLDEN / "sit" / "losses.safetensors")
    path, given = Linear(TINY, predicts=predicts), stored["out.Linear.velocity.pred"]
    given = -given if predicts == "velocity" else given
    values = fed(path, given, stored["in.x1"], stored["in.x0"], 1 - stored["in.t"])
    theirs = stored[f"out.Linear.{predicts}.{weighting.replace('none', 'None')}.loss"]
    assert off(by_row(path, values, weighting=weighting)["mse"], theirs) <= most


@pytest.mark.parametrize("variant", ["base", "qknorm", "lnmlp"])
def test_squared_error_and_cosine_equal_lightningdits(variant: str) -> None:
    stored = load_file(GOLDEN / "lightningdit" / "loss.safetensors")
    path = Linear(TINY)
    data, noise, u = stored["in.x1"], stored["in.x0"], 1 - stored["in.t"]
    values = fed(path, -stored[f"out.{variant}.pred"], data, noise, u)
    found = by_row(path, values, cosine=1.0)
    assert off(found["mse"], stored[f"out.{variant}.mse"]) <= 1e-5
    assert off(found["cosine"], stored[f"out.{variant}.cos"]) <= 5e-6
    total = sum(terms(path, values, cosine=1.0).values(), torch.zeros(()))
    assert off(total, stored[f"out.{variant}.total"]) <= 1e-5


def test_the_weights_that_ddt_offers_equal_its() -> None:
    stored = load_file(GOLDEN / "ddt" / "loss.safetensors")
    at = Linear(TINY).coefficients(1 - stored["out.t"])
    ours = {
        "inverse_sigma": "inverse_variance",
        "snr": "snr",
        "minsnr": "snr_at_least",
        "maxsnr": "snr_at_most",
    }
    for theirs, kind in ours.items():
        found = weights(kind, at, "velocity", 5.0)  # type: ignore[arg-type]
        assert off(found, stored[f"out.weight.{theirs}"]) <= 1e-5


def test_loss_and_its_gradient_equal_raes() -> None:
    """The gradient at a bias behind the prediction is the prediction's, summed over rows and places."""
    stored = load_file(GOLDEN / "dit_dh" / "loss.safetensors")
    path, prediction = Linear(TINY), stored["out.pred"].requires_grad_()
    values = fed(path, prediction, stored["in.x1"], stored["in.x0"], stored["in.t"])
    assert off(by_row(path, values)["mse"], stored["out.loss"]) <= 2e-5
    (grad,) = torch.autograd.grad(terms(path, values)["mse"], prediction)
    assert off(grad.sum((0, 2, 3)), stored["out.grad.final_layer.linear.bias"]) <= 1e-6


def test_noise_and_bound_and_their_gradients_equal_dits() -> None:
    stored = load_file(GOLDEN / "dit" / "diffusion.safetensors")
    path, output = DDPM(TINY), stored["out.model_output"].requires_grad_()
    prediction, variance = output.chunk(2, 1)
    u = ((stored["in.t"] + 1) / 1000).float()
    values = fed(path, prediction, stored["in.x_start"], stored["in.noise"], u) | {"variance": variance}
    found = by_row(path, values, vlb=1.0)
    assert off(found["mse"], stored["out.loss.mse"]) <= 5e-6
    assert off(found["vlb"], stored["out.loss.vb"]) <= 2e-5
    whole = terms(path, values, vlb=1.0)
    for loss, key in ((whole["vlb"], "vb"), (whole["vlb"] + whole["mse"], "loss")):
        (grad,) = torch.autograd.grad(loss, output, retain_graph=True)
        bias = grad.unflatten(3, (4, 2)).unflatten(2, (4, 2)).sum((0, 2, 4))  # -> (2 C, p, p)
        bias = bias.permute(1, 2, 0).flatten()  # DiT's patches are (p, p, channel)
        assert off(bias, stored[f"out.grad.{key}.final_layer.linear.bias"]) <= 2e-6


# ---- by hand


def drawn(path: Any, rows: int = 3) -> dict[str, Tensor]:
    data, noise, prediction, variance = torch.randn(4, rows, 4, 2, 2, dtype=torch.float64)
    u = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)
    return fed(path, prediction, data, noise, u) | {"variance": variance}


@pytest.mark.parametrize("cls", [Linear, GVP, VP])
@pytest.mark.parametrize("predicts", ["noise", "data", "score"])
def test_the_velocity_weighting_gives_the_error_of_the_velocity(cls: Any, predicts: Any) -> None:
    path = cls(TINY, predicts=predicts)
    values = drawn(path)
    velocity, aim = (
        path.convert(values[name], values["noised"], values["u"], "velocity")
        for name in ("prediction", "target")
    )
    found = by_row(path, values, weighting="velocity")["mse"]
    torch.testing.assert_close(found, (velocity - aim).square().flatten(1).mean(1))


@pytest.mark.parametrize("kind", ["likelihood", "min_snr"])
def test_a_weighting_is_the_same_whatever_is_predicted(kind: str) -> None:
    """Predictions that mean the same have the same weighted error."""
    values = drawn(Linear(TINY, predicts="noise"))
    given, x, u = values["prediction"], values["noised"], values["u"]
    found = {}
    for predicts in ("noise", "data", "velocity", "score"):
        path = Linear(TINY, predicts=predicts)  # type: ignore[arg-type]
        made = path.convert(given, x, u, predicts, "noise")
        same = fed(path, made, values["clean"], values["noise"], u)
        found[predicts] = by_row(path, same, weighting=kind)["mse"]
    for one in found.values():
        torch.testing.assert_close(one, found["noise"])
    if kind == "min_snr":  # arXiv 2303.09556: min(SNR, 5) times the squared error of the data
        path = Linear(TINY, predicts="data")
        error = (path.convert(given, x, u, "data", "noise") - values["clean"]).square().flatten(1).mean(1)
        torch.testing.assert_close(found["data"], ((1 - u) / u).square().clamp(max=5) * error)


def test_weights_stay_finite_at_the_ends_where_they_can() -> None:
    at = Linear(TINY).coefficients(torch.tensor([0.0, 1.0]))
    assert weights("velocity", at, "velocity", 5.0).tolist() == [1, 1]
    assert weights("min_snr", at, "velocity", 5.0).tolist() == [0, 0]
    assert weights("min_snr", at, "noise", 5.0).tolist() == [0, 1]


def test_a_perfect_prediction_costs_nothing() -> None:
    for path, options in ((Linear(TINY), {"cosine": 1.0}), (VP(TINY, predicts="score"), {})):
        values = drawn(path)
        found = terms(path, values | {"prediction": values["target"]}, **options)
        assert all(abs(value.item()) < 1e-12 for value in found.values())


def test_the_bound_of_the_true_posterior_is_nothing_but_at_the_last_step() -> None:
    path = DDPM(TINY)
    values = drawn(path)
    low = torch.full_like(values["variance"], -1)  # the posterior's own variance
    same = values | {"prediction": values["noise"], "variance": low}
    assert terms(path, same, vlb=1.0)["vlb"].item() == pytest.approx(0, abs=1e-12)


def test_the_last_step_of_the_bound_is_the_surprise_of_the_data() -> None:
    """At t = 0, with the mean on the data, the bin of half-width 1 / 255 under a normal."""
    path = DDPM(TINY)
    data = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    u, zero = torch.tensor([0.001], dtype=torch.float64), torch.zeros_like(data)
    values = fed(path, zero, data, zero, u) | {"variance": zero + 1}  # log variance is log beta
    reach = (1 / 255) / math.sqrt(1e-4)
    share = math.erf(reach / math.sqrt(2))
    assert terms(path, values, mse=0.0, vlb=1.0)["vlb"].item() == pytest.approx(-math.log2(share), abs=1e-3)


def test_terms_are_weighted_and_those_of_weight_nought_left_out() -> None:
    path = Linear(TINY)
    values = drawn(path)
    one, other = terms(path, values, cosine=1.0), terms(path, values, mse=2.0, cosine=0.5)
    assert set(one) == {"mse", "cosine"}
    torch.testing.assert_close(other["mse"], 2 * one["mse"])
    torch.testing.assert_close(other["cosine"], 0.5 * one["cosine"])
    assert set(terms(path, values)) == {"mse"}
    assert set(terms(path, values, mse=0.0, cosine=1.0)) == {"cosine"}


def test_crops_are_rows() -> None:
    path = Linear(TINY)
    values = drawn(path, rows=4)
    got = {name: value.unflatten(0, (2, 2)) for name, value in values.items()}
    found = Flow(Spec(path=path))({"flow": Outputs(got)}, CLOCK)
    assert torch.equal(found["mse"], terms(path, values)["mse"])


# ---- gradients


@pytest.mark.parametrize(
    ("path", "options", "reached"),
    [
        (Linear(TINY), {"cosine": 1.0}, {"prediction"}),
        (DDPM(TINY), {"mse": 0.0, "vlb": 1.0}, {"variance"}),
        (DDPM(TINY), {"vlb": 1.0}, {"prediction", "variance"}),
    ],
)
def test_gradient_reaches_the_generator_alone(path: Any, options: Any, reached: set[str]) -> None:
    """The bound trains the variance; the mean has its own loss."""
    values = drawn(path)
    leaves = {name: values[name].requires_grad_() for name in ("prediction", "variance")}
    loss = sum(terms(path, values, **options).values(), torch.zeros(()))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert {name for name, grad in zip(leaves, grads, strict=True) if grad.any()} == reached


def test_latents_arrive_cut_unless_told_otherwise() -> None:
    spec = Spec(path=Linear(TINY))
    assert Flow(spec).needs["flow"].cut == ("latent",)
    assert Flow(spec, cut=False).needs["flow"].cut == ()
    assert Flow(spec).needs["flow"].mask is None


# ---- the contract


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (Linear(SPEC, law="logit_normal"), {"cosine": 1.0}),
        (Linear(SPEC, predicts="data"), {"weighting": "velocity"}),
        (GVP(SPEC, predicts="score"), {"weighting": "likelihood"}),
        (VP(SPEC, predicts="noise"), {"weighting": "min_snr"}),
        (DDPM(SPEC), {"vlb": 1.0}),
    ],
)
def test_the_contract_is_kept(path: Any, options: dict[str, Any]) -> None:
    check_objective(Flow, replace(SPEC, path=path), **options)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (None, {}, "generator.path: "),
        (Linear(TINY), {"mse": 0.0}, "nothing is left"),
        (Linear(TINY, predicts="noise"), {"cosine": 1.0}, "set cosine: 0"),
        (Linear(TINY), {"vlb": 1.0}, "set vlb: 0"),
        (Linear(TINY), {"mse": 0.0, "cosine": 1.0, "weighting": "min_snr"}, "weighting: min_snr"),
        (Linear(TINY), {"weighting": "min_snr", "snr_bound": 0.0}, "snr_bound: 0.0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(Spec(path=path), **options)
