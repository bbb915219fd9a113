"""Reconstruction: distances by hand and by the lpips package; its network stays out of the way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core import weights
from vtp_core.clock import StepClock
from vtp_core.errors import DataFault
from vtp_core.nn.perceptual import Perceptual
from vtp_plugins import Outputs, Spec
from vtp_reconstruction import Reconstruction

CLOCK = StepClock()
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
RANDOM: dict[str, Any] = {"trunk": "random", "allow_random_trunk": True}


def got_of(decoded: Tensor, aim: Tensor) -> dict[str, Outputs]:
    return {"image": Outputs({"decoded": decoded, "input": aim})}


def package(perceptual: Perceptual, net: str) -> Any:
    """The lpips package's own module with the same trunk."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):  # nothing is drawn
        warnings.simplefilter("ignore")
        module = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    module = module.to_empty(device="cpu")
    module.scaling_layer = lpips.ScalingLayer()
    heads = Path(lpips.__file__).with_name("weights") / "v0.1" / f"{net}.pth"
    module.load_state_dict(torch.load(heads, map_location="cpu", weights_only=True), strict=False)
    for index, part in enumerate(perceptual.slices, 1):
        getattr(module.net, f"slice{index}").load_state_dict(part.state_dict())
    return module


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_package_on_minus_one_to_one(net: Any) -> None:
    perceptual = Perceptual(net, "random")
    pixels, aims = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    leaf = pixels.clone().requires_grad_()
    ours = perceptual((leaf - MEAN) / DEVIATION, (aims - MEAN) / DEVIATION)
    other = pixels.clone().requires_grad_()
    stored = package(perceptual, net)(2 * other - 1, 2 * aims - 1).mean()
    torch.testing.assert_close(ours, stored, rtol=1e-4, atol=1e-7)
    a, b = torch.autograd.grad(ours, leaf)[0], torch.autograd.grad(stored, other)[0]
    assert (a - b).norm() / b.norm() < 1e-4


def test_lpips_with_the_real_trunk_grows_with_damage() -> None:
    try:
        weights.path("lpips-alex")
    except DataFault as missing:
        pytest.skip(str(missing))
    perceptual = Perceptual("alex")
    picture = torch.randn(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn_like(picture)
    distances = [float(perceptual(picture + amount * noise, picture)) for amount in (0.0, 0.2, 0.6)]
    assert distances[0] == 0 and distances[0] < distances[1] < distances[2]


def test_distances_are_those_by_hand() -> None:
    decoded, aim = torch.randn(1, 2, 3, 8, 8), torch.randn(1, 2, 3, 8, 8)
    terms = Reconstruction(Spec(), l1=1.0, l2=3.0, lpips=0.0)(got_of(decoded, aim), CLOCK)
    torch.testing.assert_close(terms["l1"], (decoded - aim).abs().mean())
    torch.testing.assert_close(terms["l2"], 3 * (decoded - aim).square().mean())
    pixel = Reconstruction(Spec(), lpips=0.0, space="pixel")(got_of(decoded, aim), CLOCK)
    torch.testing.assert_close(pixel["l1"], ((decoded - aim) * DEVIATION).abs().mean())


def test_sums_count_every_number_and_lpips_with_each() -> None:
    decoded, aim = torch.randn(1, 2, 3, 64, 64), torch.randn(1, 2, 3, 64, 64)
    kinds: Any = {"space": "signed", "l2": 0.5, **RANDOM}
    mean = Reconstruction(Spec(), **kinds)(got_of(decoded, aim), CLOCK)
    off = 2 * (decoded - aim) * DEVIATION  # in [-1, 1]
    torch.testing.assert_close(mean["l1"], off.abs().mean())
    torch.testing.assert_close(mean["l2"], 0.5 * off.square().mean())
    total = Reconstruction(Spec(), reduction="sum", **kinds)(got_of(decoded, aim), CLOCK)
    torch.testing.assert_close(total["l1"], off.abs().sum() / 2)
    torch.testing.assert_close(total["lpips"], 3 * 64 * 64 * mean["lpips"])


def test_only_weighted_distances_are_computed() -> None:
    x = torch.randn(1, 2, 3, 64, 64)
    assert set(Reconstruction(Spec(), l1=0.0, **RANDOM)(got_of(x, x), CLOCK)) == {"lpips"}
    assert set(Reconstruction(Spec(), lpips=0.0)(got_of(x, x), CLOCK)) == {"l1"}


def test_the_network_is_neither_trained_nor_saved_nor_switched() -> None:
    objective = Reconstruction(Spec(), **RANDOM).train()
    assert not list(objective.parameters()) and not objective.state_dict()
    assert objective.perceptual is not None
    assert all(not part.training for part in objective.perceptual.slices)
    decoded = torch.randn(1, 2, 3, 64, 64, requires_grad=True)
    aim = torch.randn(1, 2, 3, 64, 64, requires_grad=True)
    first = objective(got_of(decoded, aim), CLOCK)["lpips"]
    assert torch.equal(first, objective(got_of(decoded, aim), CLOCK)["lpips"])
    first.backward()
    assert decoded.grad is not None and aim.grad is None
    assert all(p.grad is None for part in objective.perceptual.slices for p in part.parameters())


def test_black_features_give_no_nan() -> None:
    perceptual = Perceptual("alex", "random")
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    perceptual(x, torch.randn(1, 3, 64, 64)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_float64_stays_float64() -> None:
    x = torch.randn(1, 1, 3, 64, 64).double()
    terms = Reconstruction(Spec(), l2=1.0, **RANDOM)(got_of(x, -x), CLOCK)
    assert all(term.dtype == torch.float64 for term in terms.values())


def test_building_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    Reconstruction(Spec(), **RANDOM)
    assert torch.equal(before, torch.random.get_rng_state())


def test_missing_weights_name_the_command_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(DataFault, match="vtp weights import lpips-alex"):
        Reconstruction(Spec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trunk": "random"}, "allow_random_trunk"),
        ({"l1": 0.0, "lpips": 0.0}, "nothing is left"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reconstruction(Spec(), **options)


def test_other_modalities_have_no_lpips() -> None:
    with pytest.raises(ValueError, match="lpips: 0"):
        Reconstruction(Spec(modality="audio", size=(100,), patch=(10,)))
