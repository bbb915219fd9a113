"""The convolutional encoder and decoder, the posterior between them and its divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vtp_core.clock import StepClock
from vtp_core.errors import StackFault
from vtp_core.modalities import Image
from vtp_core.models.bottlenecks import Chain
from vtp_ldm import KL, CNNDecoder, CNNEncoder, Gaussian
from vtp_plugins import Outputs, Spec
from vtp_plugins.testing import check_objective

CLOCK = StepClock(seed=1)
SMALL: dict[str, Any] = {"channels": 4, "multipliers": [1, 2, 2], "blocks": 1, "attention": [8], "groups": 2}


def encoder(**options: Any) -> CNNEncoder:
    return CNNEncoder(Spec(size=(0, 0)), **{**SMALL, "image_size": 32, "z_channels": 3, **options})


def decoder(spec: Spec | None = None, **options: Any) -> CNNDecoder:
    return CNNDecoder(spec or Spec(size=(32, 32), patch=(4, 4), channels=3), **{**SMALL, **options})


def moments(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(2))


# ---- objective


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "token"}, {"reduction": "mean", "half": False}, {"view": "other"}]
)
def test_the_objective_keeps_the_contract(options: dict[str, Any]) -> None:
    check_objective(KL, **options)


def test_the_divergence_is_that_by_hand() -> None:
    mean, log_variance = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    got = {"image": Outputs({"posterior": (mean, log_variance)})}
    by_hand = 0.5 * (1 + 1 - 1 - 0) + 0.5 * (4 + torch.e - 1 - 1)
    assert float(KL(Spec())(got, CLOCK)["divergence"]) == pytest.approx(by_hand, rel=1e-6)
    bare = KL(Spec(), reduction="mean", half=False)(got, CLOCK)["divergence"]
    assert float(bare) == pytest.approx(by_hand, rel=1e-6)  # half of twice as many


def test_reductions_differ_by_counts() -> None:
    mean, log_variance = torch.randn(2, 2, 3, 5, 4)  # two of (K, R, N, C)
    got = {"image": Outputs({"posterior": (mean, log_variance)})}
    found = {
        kind: float(KL(Spec(), reduction=kind)(got, CLOCK)["divergence"]) for kind in ("sum", "token", "mean")
    }
    assert found["sum"] == pytest.approx(5 * found["token"], rel=1e-5)
    assert found["token"] == pytest.approx(4 * found["mean"], rel=1e-5)


def test_a_standard_normal_posterior_costs_nothing() -> None:
    got = {"image": Outputs({"posterior": (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))})}
    assert float(KL(Spec())(got, CLOCK)["divergence"]) == 0


# ---- bottleneck


def test_only_training_with_a_clock_draws() -> None:
    link = Gaussian(Spec(width=6), channels=3, project=False)
    for found in (link.eval()(moments(), CLOCK), link.train()(moments())):
        assert torch.equal(found["latent.sample"], found["latent"])
    found = link.train()(moments(), CLOCK)
    mean, log_variance = found["posterior"]
    noise = (found["latent.sample"] - mean) / (0.5 * log_variance).exp()
    torch.testing.assert_close(noise, CLOCK.normal("posterior", 4, 5, 3), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["latent"], mean) and torch.equal(mean, moments()[..., :3])


def test_processes_draw_what_one_draws() -> None:
    link = Gaussian(Spec(width=6), channels=3, project=False).train()
    whole = link(moments(), CLOCK)["latent.sample"]
    for rank in range(2):
        part = link(moments()[rank::2], StepClock(seed=1, world=2, rank=rank))["latent.sample"]
        assert torch.equal(part, whole[rank::2])


def test_later_links_apply_to_mean_and_draw() -> None:
    from vtp_core.models.bottlenecks import RMSNorm

    chain = Chain([Gaussian(Spec(width=6), channels=3), RMSNorm(Spec(channels=3))]).train()
    found = chain(moments(), CLOCK)
    for name in ("latent", "latent.sample"):
        torch.testing.assert_close(found[name].square().mean(-1), torch.ones(4, 5), rtol=1e-4, atol=1e-4)
    assert found["carried"] is found["latent.sample"] and not torch.equal(found["latent"], found["carried"])


def test_low_precision_moments_have_a_wide_log_variance() -> None:
    link = Gaussian(Spec(width=6), channels=3, project=False).train()
    found = link(moments().bfloat16(), CLOCK)
    assert found["latent.sample"].dtype == found["latent"].dtype == torch.bfloat16
    assert found["posterior"][1].dtype == torch.float32
    assert link(moments().double(), CLOCK)["latent.sample"].dtype == torch.float64


def test_the_clamp_passes_no_gradient() -> None:
    x = torch.tensor([[[0.0, 25.0], [0.0, 1.0], [0.0, -33.0]]], requires_grad=True)
    _, log_variance = Gaussian(Spec(width=2), channels=1, project=False)(x)["posterior"]
    assert log_variance.flatten().tolist() == [20.0, 1.0, -30.0]
    log_variance.sum().backward()
    assert x.grad is not None and x.grad[0, :, 1].tolist() == [0.0, 1.0, 0.0]


# ---- networks


def test_tokens_are_places_of_the_last_map() -> None:
    network, x = encoder(), torch.randn(3, 3, 32, 32)
    found = network(x)
    assert found["patches"].shape == (3, 64, 6) and network.width == 6 and network.patch == (4, 4)
    torch.testing.assert_close(found["cls"], found["patches"].mean(1))
    assert set(network(x, want={"patches": 2})) == {"patches"}
    torch.testing.assert_close(network(x, want={"patches@some": 2})["patches"], found["patches"][:2])
    assert encoder(double_z=False)(x)["patches"].shape == (3, 64, 3)
    assert encoder(image_size=(32, 16), attention=[4])(x[..., :16])["patches"].shape == (3, 32, 6)


def test_a_picture_of_another_size_goes_through_both() -> None:
    x = torch.randn(1, 3, 48, 20)
    assert encoder()(x)["patches"].shape == (1, 12 * 5, 6)
    assert decoder()(torch.randn(1, 3, 12, 5))["decoded"].shape == x.shape


def test_attention_stands_where_the_options_say() -> None:
    assert [len(level.attn) for level in encoder(blocks=2).down] == [0, 0, 2]
    assert [len(level.attn) for level in decoder(attention=[32, 16]).up] == [2, 2, 0]
    assert [len(level.attn) for level in encoder(image_size=64, resolution=32).down] == [0, 0, 1]


def test_the_anchors_are_the_last_convolutions() -> None:
    assert encoder().anchors["last"].shape == (6, 8, 3, 3)
    assert decoder().anchors["last"].shape == (3, 4, 3, 3)


def test_signed_networks_see_twice_the_picture_less_one() -> None:
    images, image = torch.rand(2, 3, 32, 32, dtype=torch.float64), Image()
    for dtype, limit in ((torch.float64, 1e-14), (torch.float32, 5e-7)):
        network, mirror = encoder().to(dtype), decoder().to(dtype)
        assert network.range is not None and mirror.range is not None
        x = image.normalise(images.to(dtype))
        assert (network.range.entered(x) - (2 * images - 1)).abs().max() < limit
        back = image.to_display(mirror.range.left(network.range.entered(x)))
        assert (back - images).abs().max() < limit
    kept = encoder(range="normalised")
    assert kept.range is None and kept.state_dict().keys() == encoder().state_dict().keys()


def test_a_signed_network_is_a_normalised_one_behind_the_map() -> None:
    signed, plain = encoder(), encoder(range="normalised")
    plain.load_state_dict(signed.state_dict())
    images = torch.rand(2, 3, 32, 32)
    ours = signed(Image().normalise(images))["patches"]
    torch.testing.assert_close(ours, plain(2 * images - 1)["patches"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30, "attention": []}, "image_size: 30 x 30 is not a multiple of 4"),
        ({"attention": [5]}, "no level has side 5; of a picture of 32 the sides are 32, 16, 8"),
        ({"groups": 3}, "groups: 3 does not divide 4"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_what_convolutions_cannot_do_is_refused() -> None:
    network, x = encoder(), torch.randn(1, 3, 32, 32)
    with pytest.raises(StackFault, match="gives cls and patches"):
        network(x, want={"hidden:1": 1})
    with pytest.raises(StackFault, match="no mask token"):
        network(x, mask=torch.zeros(1, 64, dtype=torch.bool))
    with pytest.raises(StackFault, match="no drop-path"):
        network(x, drop=0.1)
    network(x, drop=0.0)
    with pytest.raises(ValueError, match=r"reads \(B, 3, H, W\)"):
        network(x[:, :2])
    with pytest.raises(ValueError, match="not a multiple"):
        network(x[..., :31])
    with pytest.raises(StackFault, match="gives decoded"):
        decoder()(torch.randn(1, 3, 8, 8), want=frozenset({"decoder.hidden:1"}))
    with pytest.raises(ValueError, match=r"reads \(B, 3, h, w\)"):
        decoder()(torch.randn(1, 4, 8, 8))


def test_widths_that_do_not_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="levels enlarge by 4, but the encoder shrinks by 8"):
        decoder(Spec(size=(32, 32), patch=(8, 8), channels=3))
    with pytest.raises(ValueError, match="project: false leaves 3 channels"):
        decoder(project=False, z_channels=5)
    with pytest.raises(ValueError, match="set channels: 3 or project: true"):
        Gaussian(Spec(width=6), channels=4, project=False)
    sound = Spec(modality="audio", size=(0,), signal_channels=1)
    with pytest.raises(ValueError, match="1 axes"):
        CNNEncoder(sound)
    with pytest.raises(ValueError, match="range: normalised"):
        CNNEncoder(Spec(modality="depth", signal_channels=1))
