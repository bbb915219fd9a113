"""Adversarial training of what is decoded (arXiv 1406.2661), as VQGAN, VA-VAE and RAE do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vtp_core.data.views import Plain
from vtp_core.modalities import MEAN, STD
from vtp_core.nn.backbones import backbone as network_of
from vtp_core.nn.chunked import wide
from vtp_gan.augment import DRAWS, augmented, blurred, quantised
from vtp_gan.features import FeatureCritic
from vtp_gan.layers import Layer, Norm, Turn
from vtp_gan.losses import Kind, critic_loss, generator_loss, gradient_penalty, lecam_distance
from vtp_gan.patch import PatchGAN
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import AdversarialObjective
from vtp_plugins.spec import Spec

Got = Mapping[str, Outputs]


class GAN(AdversarialObjective):
    """A critic tells pictures from their reconstructions, and the decoder is paid for deceiving it.

    Args:
        spec: shapes of the tokenizer.
        loss: of the critic; the generator's is -logit, or (1 - logit)^2 with ``lsgan``.
        saturates: False pays the generator softplus(-logit) instead.
        discriminator: a PatchGAN, or heads on the ``features`` of a frozen network.
        norm: of the critic: over the ``batch`` (the default of ``patch``) or each ``sample`` on its own (of
            ``features``), ``group``, ``actnorm``, ``none``.
        statistics: that a batch norm reads in the generator's turn: the batch's (taming) or the running ones.
        channels: width of the PatchGAN's first layer.
        layers: strided layers of the PatchGAN.
        backbone: the frozen network, a name of ``vtp_core.nn.backbones``.
        taps: its blocks that are read, 1 is the first; by default what suits the network.
        kernel: taps of the heads' convolution over tokens, odd.
        side: that the frozen network's pictures are resized to; by default its own.
        weights: file of its weights, else ``$VTP_HOME/weights``.
        allow_random_backbone: says that this is a test.
        diffaug: probability of each of DiffAug's kinds in a step; 0 leaves pictures alone.
        cutout: side of DiffAug's square, a share of the picture's; 0 cuts nothing.
        blur_until: share of the run until which both sides are blurred, less and less.
        quantise: round fakes to 8 bits in the critic's turn, as files would.
        r1: weight of the gradient penalty on real pictures.
        lecam: weight of LeCam's regularisation.
        lecam_decay: of its moving means.
        view: which view is decoded.
    """

    critic: PatchGAN | FeatureCritic
    anchors: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        loss: Kind = "hinge",
        saturates: bool = True,
        discriminator: Literal["patch", "features"] = "patch",
        norm: Norm | None = None,
        statistics: Literal["batch", "running"] = "batch",
        channels: int = 64,
        layers: int = 3,
        backbone: str = "lite0",
        taps: tuple[int, ...] = (),
        kernel: int = 9,
        side: int | None = None,
        weights: str | None = None,
        allow_random_backbone: bool = False,
        diffaug: float = 0.0,
        cutout: float = 0.0,
        blur_until: float = 0.0,
        quantise: bool = False,
        r1: float = 0.0,
        lecam: float = 0.0,
        lecam_decay: float = 0.99,
        view: str = "image",
    ) -> None:
        super().__init__()
        if spec.modality != "image":
            raise ValueError(f"modality {spec.modality!r}: these critics look at images")
        norm = norm or ("batch" if discriminator == "patch" else "sample")
        if r1 and norm == "batch":
            raise ValueError(
                "r1 takes the gradient of a picture's own logits, which norm: batch mixes; set norm: group"
            )
        self.kind, self.saturates, self.statistics = loss, saturates, statistics
        self.diffaug, self.cutout, self.blur_until, self.quantise = diffaug, cutout, blur_until, quantise
        self.r1, self.lecam, self.lecam_decay = r1, lecam, lecam_decay
        self.coupled = norm in {"batch", "actnorm"}
        self.needs = {"image": Need(view, {"decoded", "input"}, mask=None)}
        if view == "image":
            self.views = {"image": Plain(spec)}
        if discriminator == "patch":
            self.critic = PatchGAN(spec.signal_channels, spec.size, channels, layers, norm)
        else:
            frozen = network_of(
                backbone, taps=taps, side=side, file=weights, allow_random=allow_random_backbone
            )
            self.critic = FeatureCritic(frozen, kernel, norm)
        self.register_buffer("anchors", torch.zeros(3))  # moving sums of real, fake, 1

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        looks = options["discriminator"] == "features" and options["backbone"] != "random"
        return (options["backbone"],) if looks else ()

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        """The generator's turn: gradient passes through the critic."""
        turn = Turn(clock, self.pending, batch=self.statistics == "batch", learns=False)
        decoded = got["image"]["decoded"]
        fake = self._seen(signed(decoded), decoded.shape[0], "generator", clock)
        return {"fooled": generator_loss(self.kind, wide(self.critic(fake, turn)), self.saturates)}

    def critique(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        """The critic's turn."""
        given, turn = got["image"], Turn(clock, self.pending)
        pictures = {"real": signed(given["input"]).detach(), "fake": signed(given["decoded"]).detach()}
        pictures["real"].requires_grad_(self.r1 > 0)
        if self.quantise:
            pictures["fake"] = quantised(pictures["fake"])
        logits = {
            side: wide(self.critic(self._seen(pictures[side], len(given["input"]), side, clock), turn))
            for side in self.critic.order
        }
        terms = {side: critic_loss(self.kind, logits[side], side == "real") for side in ("real", "fake")}
        if self.r1:
            terms["r1"] = self.r1 * gradient_penalty(logits["real"], pictures["real"])
        if self.lecam:
            terms["lecam"] = self.lecam * self._tied(logits["real"], logits["fake"])
        return terms

    def _seen(self, x: Tensor, crops: int, name: str, clock: Clock) -> Tensor:
        """Pictures (K R, ch, H, W) as the critic gets them; crops first."""
        if clock.share < self.blur_until:
            x = blurred(x, 1 - clock.share / self.blur_until)
        if self.diffaug:
            draws = clock.uniform(f"{name}/augment", len(x) // crops, crops, DRAWS).to(x.device)
            switches = (torch.rand(3, generator=clock.rng(f"{name}/switches")) <= self.diffaug).tolist()
            x = augmented(x, draws.permute(2, 1, 0).flatten(1), switches, self.cutout)
        return x

    def _tied(self, real: Tensor, fake: Tensor) -> Tensor:
        """LeCam's distance from the means so far; 0 in the first turn, which has none."""
        seen = torch.stack([real.detach().sum(), fake.detach().sum(), real.new_tensor(real.numel())])
        self.pending["lecam"] = self.pending.get("lecam", 0) + seen
        means, weight = self.anchors[:2], self.anchors[2]  # both grow from 0 alike
        return lecam_distance(real, fake, means / weight.clamp(min=1e-12)) * (weight > 0)

    @torch.no_grad()
    def settle(self, clock: Clock) -> None:
        """Running statistics, directions of spectral norms, moving means."""
        for layer in self.critic.modules():
            if isinstance(layer, Layer):
                layer.settle(self.pending)
        if "lecam" in self.pending:
            real, fake, count = clock.total(self.pending["lecam"])
            means = torch.stack([real / count, fake / count, torch.ones_like(count)])
            self.anchors.lerp_(means.to(self.anchors), 1 - self.lecam_decay)
        super().settle(clock)


def signed(x: Tensor) -> Tensor:
    """Pictures (K, R, 3, H, W), normalised as encoders read them, to (K R, 3, H, W) in [-1, 1]."""
    x = wide(x.flatten(0, 1))
    std, mean = (x.new_tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    return x * (2 * std) + (2 * mean - 1)
