"""A critic on frozen features: small spectrally normalised heads, one for every tap (arXiv 2301.09515, 2510.11690)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtp_core.nn.backbones import Backbone
from vtp_gan.layers import Chain, Norm, SpectralConv, Turn, named, norm_of


class Residual(Chain):
    """(f(x) + x) / sqrt(2); its only member is f."""

    def __init__(self, fn: Chain) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        mixed: Tensor = (self.fn(x, turn) + x) * math.sqrt(0.5)
        return mixed


class FeatureCritic(nn.Module):
    """Logits of every token of every tap of a frozen network; keys as bytetriper/RAE's heads.

    The network is no submodule: it is neither trained, nor saved, nor switched to training mode.

    Args:
        backbone: frozen; it resizes and normalises pictures itself.
        kernel: taps of the residual convolution, odd.
        norm: after each convolution.
        eps: of the norms.
    """

    order = ("fake", "real")

    def __init__(self, backbone: Backbone, kernel: int, norm: Norm, eps: float = 1e-6) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel: taps are odd, not {kernel}")
        self._frozen = (backbone,)
        self.heads = nn.ModuleList(_head(width, kernel, norm, eps) for width in backbone.widths)
        named(self)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to logits (B, taps' tokens)."""
        taps = self._following(x)(x)
        return torch.cat(
            [head(tap, turn).squeeze(1) for head, tap in zip(self.heads, taps, strict=True)], 1
        )  # (B, 1, N) -> (B, N), side by side

    def _following(self, x: Tensor) -> Backbone:
        """The network where x is; a submodule would be moved by its parent."""
        (backbone,) = self._frozen
        first = next(iter(backbone.parameters()))
        return backbone if (first.device, first.dtype) == (x.device, x.dtype) else backbone.to(x)


def _head(width: int, kernel: int, norm: Norm, eps: float) -> Chain:
    def block(taps: int) -> Chain:
        return Chain([SpectralConv(width, width, taps), norm_of(norm, width, eps), nn.LeakyReLU(0.2)])

    return Chain([block(1), Residual(block(kernel)), SpectralConv(width, 1, 1)])
