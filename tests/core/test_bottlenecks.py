from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.models.bottlenecks import Chain, Linear, Noise, RMSNorm
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec

CLOCK = StepClock(seed=1)


class KL(nn.Module):
    carries = "latent.sample"
    channels = 4

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        made = {"latent": x, "posterior": torch.cat([x, torch.zeros_like(x)], -1)}
        if clock is not None and self.training:
            made["latent.sample"] = x + clock.normal("sample", *x.shape)
        return made


class Rounding(nn.Module):
    """A quantiser to whole numbers, straight through."""

    carries = "latent.quantised"
    channels = 4

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        return {"latent": x, "latent.quantised": x + (x.round() - x).detach(), "indices": x.round().long()}


def tokens(*shape: int) -> Tensor:
    return 3 * torch.randn(*(shape or (6, 5, 4)), generator=torch.Generator().manual_seed(0))


def test_linear_reads_the_width_and_then_the_channels_before_it() -> None:
    first = Linear(Spec(width=16), channels=8)
    second = Linear(Spec(width=16, channels=8), channels=4, bias=True)
    chain = Chain([first, second])
    assert chain.channels == 4
    assert first.bias is None
    x = tokens(2, 5, 16)
    out = chain(x)
    torch.testing.assert_close(out["latent"], second(first(x)["latent"])["latent"])
    assert out["carried"] is out["latent"]
    assert out.keys() == {"latent", "carried"}


def test_tokens_without_a_row_axis_pass() -> None:
    assert Chain([Linear(Spec(width=16), channels=8), RMSNorm(Spec(channels=8))])(tokens(7, 16))[
        "latent"
    ].shape == (7, 8)


def test_an_empty_chain_gives_what_it_reads() -> None:
    chain, x = Chain([], channels=16), tokens(2, 5, 16)
    assert chain.channels == 16
    assert chain(x)["latent"] is x


def test_rms_norm_puts_tokens_on_a_sphere() -> None:
    y = RMSNorm(Spec(width=4))(tokens())["latent"]
    torch.testing.assert_close(y.norm(dim=-1), torch.full((6, 5), 2.0))


def test_noise_reaches_the_decoder_and_leaves_the_latent_clean() -> None:
    chain = Chain([RMSNorm(Spec(channels=4)), Noise(Spec(channels=4))])
    out = chain(tokens(), CLOCK)
    torch.testing.assert_close(out["latent"].norm(dim=-1), torch.full((6, 5), 2.0))
    assert out["carried"] is out["latent.noisy"]
    assert not torch.allclose(out["latent.noisy"], out["latent"])


@pytest.mark.parametrize("training", [True, False])
def test_noise_needs_a_clock_and_training(training: bool) -> None:
    chain = Chain([Noise(Spec(channels=4))]).train(training)
    out = chain(tokens(), None if training else CLOCK)
    assert torch.equal(out["carried"], out["latent"])


def test_noise_meets_a_row_alike_for_any_number_of_processes() -> None:
    link, x = Noise(Spec(channels=4)), tokens()
    whole = link(x, CLOCK)["latent.noisy"]
    for rank in range(2):
        part = link(x[rank::2], StepClock(seed=1, world=2, rank=rank))["latent.noisy"]
        assert torch.equal(part, whole[rank::2])


@pytest.mark.parametrize(
    ("law", "mean", "highest"),
    [("uniform", 0.4, 0.8), ("half_normal", 0.8 * (2 / torch.pi) ** 0.5, 9.0), ("fixed", 0.8, 0.8)],
)
def test_noise_levels_follow_their_law(law: str, mean: float, highest: float) -> None:
    link = Noise(Spec(channels=64), law=law, tau=0.8)  # type: ignore[arg-type]
    levels = link(torch.zeros(2000, 8, 64), CLOCK)["latent.noisy"].flatten(1).std(1)
    assert abs(levels.mean() - mean) < 0.05
    assert levels.max() < highest * 1.2


def test_a_norm_after_noise_applies_to_both_streams() -> None:
    out = Chain([Noise(Spec(channels=4)), RMSNorm(Spec(channels=4))])(tokens(), CLOCK)
    for name in ("latent", "latent.noisy", "carried"):
        torch.testing.assert_close(out[name].norm(dim=-1), torch.full((6, 5), 2.0))
    assert not torch.allclose(out["latent"], out["carried"])


def test_a_posterior_is_sampled_in_training_and_its_mean_is_the_latent() -> None:
    chain, x = Chain([KL(), Linear(Spec(channels=4), channels=2)]), tokens()
    link = chain.links[1]
    out = chain(x, CLOCK)
    assert out.keys() == {"latent", "latent.sample", "posterior", "carried"}
    torch.testing.assert_close(out["latent"], link(x)["latent"])
    torch.testing.assert_close(out["carried"], link(x + CLOCK.normal("sample", *x.shape))["latent"])
    assert out["latent.sample"] is out["carried"]
    quiet = chain.eval()(x, CLOCK)
    assert quiet["carried"] is quiet["latent"]


def test_noise_after_a_sample_keeps_all_three() -> None:
    out = Chain([KL(), Noise(Spec(channels=4), law="fixed", tau=1.0)])(tokens(), CLOCK)
    assert torch.equal(out["latent"], tokens())
    torch.testing.assert_close(out["latent.sample"], tokens() + CLOCK.normal("sample", 6, 5, 4))
    assert out["carried"] is out["latent.noisy"]
    assert not torch.allclose(out["latent.noisy"], out["latent.sample"])


@pytest.mark.parametrize("training", [True, False])
def test_a_quantiser_is_carried_in_training_and_in_eval(training: bool) -> None:
    x = tokens().requires_grad_()
    out = Chain([Rounding()]).train(training)(x, CLOCK)
    assert out["carried"] is out["latent.quantised"]
    assert torch.equal(out["latent"], x)
    torch.testing.assert_close(out["carried"], x.round())
    (grad,) = torch.autograd.grad(out["carried"].sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    assert out["indices"].dtype == torch.int64
