"""Reconstruction: the decoded picture against its input by L1, L2 and LPIPS (arXiv 2512.13687, eq. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vtp_core.data.views import Plain
from vtp_core.nn.chunked import wide
from vtp_core.nn.perceptual import Perceptual
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec

DEVIATION = (0.229, 0.224, 0.225)  # of ImageNet's channels, which the image modality divides by


class Reconstruction(Objective):
    """Weighted distances between decoded and input; a distance of weight 0 is not computed.

    Args:
        spec: shapes of the tokenizer.
        l1: weight of the mean absolute difference.
        l2: weight of the mean squared difference.
        lpips: weight of the perceptual distance, for images only.
        net: its network; ``alex`` suits a CPU, ``vgg`` is what most papers train with.
        space: where L1 and L2 are taken: as the encoder reads, pixels in [0, 1], or ``signed`` in [-1, 1].
        reduction: over one signal: ``mean``, or ``sum``, in which LPIPS counts once for every number of the
            signal (LDM, arXiv 2112.10752; VA-VAE, arXiv 2501.01423).
        view: which view is decoded.
        trunk: ``random`` needs no weights; its LPIPS means nothing.
        allow_random_trunk: says that this is a test.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        l1: float = 1.0,
        l2: float = 0.0,
        lpips: float = 1.0,
        net: Literal["alex", "vgg"] = "alex",
        space: Literal["normalised", "pixel", "signed"] = "normalised",
        reduction: Literal["mean", "sum"] = "mean",
        view: str = "image",
        trunk: Literal["weights", "random"] = "weights",
        allow_random_trunk: bool = False,
    ) -> None:
        super().__init__()
        if spec.modality != "image" and (lpips or space != "normalised"):
            raise ValueError(
                f"modality {spec.modality!r} has no LPIPS and no pixels; set lpips: 0, space: normalised"
            )
        if trunk == "random" and not allow_random_trunk:
            raise ValueError(
                "trunk: random makes LPIPS meaningless; for a test, set allow_random_trunk: true"
            )
        if not (l1 or l2 or lpips):
            raise ValueError("l1, l2 and lpips are all 0; nothing is left to compute")
        self.l1, self.l2, self.lpips = l1, l2, lpips
        self.space, self.reduction = space, reduction
        self.needs = {"image": Need(view, {"decoded", "input"}, mask=None)}
        if view == "image":
            self.views = {"image": Plain(spec)}
        self.perceptual = Perceptual(net, trunk) if lpips else None

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        used = options["lpips"] and options["trunk"] == "weights"
        return (f"lpips-{options['net']}",) if used else ()

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, ch channels of the signal."""
        decoded = wide(got["image"]["decoded"].flatten(0, 1))  # (K, R, ch, ...) -> (K R, ch, ...)
        aim = wide(got["image"]["input"].flatten(0, 1))
        off = decoded - aim
        if self.space != "normalised":
            scale = 2.0 if self.space == "signed" else 1.0
            off = off * (scale * off.new_tensor(DEVIATION)[:, None, None])
        terms = {}
        if self.l1:
            terms["l1"] = self.l1 * off.abs().mean()
        if self.l2:
            terms["l2"] = self.l2 * off.square().mean()
        if self.perceptual is not None:
            terms["lpips"] = self.lpips * self.perceptual(decoded, aim)
        if self.reduction == "sum":
            terms = {name: term * decoded[0].numel() for name, term in terms.items()}
        return terms
