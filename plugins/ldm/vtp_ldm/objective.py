"""The KL divergence of the posterior from a standard normal (arXiv 1312.6114, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from vtp_core.data.views import Plain
from vtp_core.nn.chunked import wide
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class KL(Objective):
    """1/2 (mean^2 + variance - 1 - log variance), over the latent of a posterior.

    Args:
        spec: shapes of the tokenizer.
        reduction: over one signal's latent: ``sum`` (LDM, VA-VAE, with a weight near 1e-6), ``token``: summed
            over channels, averaged over tokens (Semantic-VAE, JMAS-VAE), or ``mean``.
        half: whether there is a factor of 1/2; some code has none.
        view: whose latent is read.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        reduction: Literal["sum", "token", "mean"] = "sum",
        half: bool = True,
        view: str = "image",
    ) -> None:
        super().__init__()
        self.reduction, self.factor = reduction, 0.5 if half else 1.0
        self.needs = {"image": Need(view, "posterior", mask=None)}
        if view == "image" and spec.modality == "image":
            self.views = {"image": Plain(spec)}

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, N tokens, C channels."""
        mean, log_variance = (wide(part) for part in got["image"]["posterior"])  # (K, R, N, C)
        each = mean.square() + log_variance.exp() - 1 - log_variance
        if self.reduction != "mean":
            each = each.sum(-1)  # (K, R, N, C) -> (K, R, N)
        if self.reduction == "sum":
            each = each.sum(-1)  # (K, R, N) -> (K, R)
        return {"divergence": self.factor * each.mean()}
