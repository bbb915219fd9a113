"""The diagonal Gaussian posterior between encoder and decoder (arXiv 1312.6114; as in arXiv 2112.10752)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.models.bottlenecks import width_in
from vtp_core.nn.chunked import wide
from vtp_core.nn.precision import full_precision
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec

LOG_VARIANCES = (-30.0, 20.0)
LEAST = 1e-4  # deviation under softplus


class Gaussian(nn.Module):
    """Tokens to mean and log-variance of their latent; in training the decoder reads a draw.

    Outputs: ``latent``, the mean; ``latent.sample``, the draw, and the mean where nothing is drawn;
    ``posterior``, (mean, log-variance), each (..., N, C).

    Args:
        spec: tells the channels that it reads.
        channels: C of the latent.
        project: a matrix over channels first, which is the reference's ``quant_conv``; without it the tokens
            are the moments.
        variance: what the second half of the moments is: ``log``, the log-variance, kept in [-30, 20]; or
            ``softplus``: the deviation is softplus(s) + 1e-4 (JMAS-VAE, arXiv 2604.12383).
    """

    carries: ClassVar[str] = "latent.sample"

    def __init__(
        self,
        spec: Spec,
        *,
        channels: Annotated[int, Field(gt=0)],
        project: bool = True,
        variance: Literal["log", "softplus"] = "log",
    ) -> None:
        super().__init__()
        if not project and width_in(spec) != 2 * channels:
            raise ValueError(
                f"project: false needs {2 * channels} channels for mean and variance, but gets "
                f"{width_in(spec)}; set channels: {width_in(spec) // 2} or project: true"
            )
        self.channels, self.variance = channels, variance
        self.quant_conv = nn.Linear(width_in(spec), 2 * channels) if project else None

    def forward(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """Tokens (..., N, D) to tokens (..., N, C)."""
        moments = x if self.quant_conv is None else self.quant_conv(x)
        mean, second = moments.chunk(2, -1)  # (..., N, 2 C) -> 2 x (..., N, C)
        with full_precision(x):
            if self.variance == "log":
                log_variance = wide(second).clamp(*LOG_VARIANCES)
            else:
                log_variance = 2 * (F.softplus(wide(second)) + LEAST).log()
            sample = mean
            if clock is not None and self.training:
                noise = clock.normal("posterior", *mean.shape).to(log_variance)
                sample = (wide(mean) + (0.5 * log_variance).exp() * noise).to(mean.dtype)
        return {"latent": mean, "latent.sample": sample, "posterior": (mean, log_variance)}
