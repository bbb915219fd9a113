"""PatchGAN: a convolutional critic with one logit for every patch (arXiv 1611.07004; sizes of 2012.09841)."""

from __future__ import annotations

from torch import Tensor, nn

from vtp_gan.layers import BatchNorm, Chain, Norm, Turn, named, norm_of

SIDE = 4  # of every kernel


class PatchGAN(nn.Module):
    """Strided convolutions, then two of stride 1; keys as CompVis/taming-transformers'.

    Args:
        inputs: channels of the picture.
        size: of the picture, (H, W).
        channels: width of the first layer; every further one doubles it, up to eight times.
        layers: strided layers; the picture shrinks by 2^layers.
        norm: between the layers.

    Raises:
        ValueError: the picture is too small for so many layers.
    """

    order = ("real", "fake")

    def __init__(self, inputs: int, size: tuple[int, ...], channels: int, layers: int, norm: Norm) -> None:
        super().__init__()
        if layers < 1 or min(size) >> layers < 3:
            fits = max(1, (min(size) // 3).bit_length() - 1)
            raise ValueError(
                f"layers: {layers} strided layers leave no patch of {min(size)} pixels; at most {fits} do"
            )
        bias = norm != "batch"  # a batch norm takes a bias out again
        main: list[nn.Module] = [nn.Conv2d(inputs, channels, SIDE, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, layers + 1):
            before, width = width, channels * min(2**level, 8)
            stride = 2 if level < layers else 1
            main += [
                nn.Conv2d(before, width, SIDE, stride, 1, bias=bias), norm_of(norm, width), nn.LeakyReLU(0.2)
            ]  # fmt: skip
        self.main = Chain([*main, nn.Conv2d(width, 1, SIDE, 1, 1)])
        self.apply(_reset)
        named(self)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """Pictures (B, ch, H, W) in [-1, 1] to logits (B, 1, h, w)."""
        logits: Tensor = self.main(x, turn)
        return logits


def _reset(module: nn.Module) -> None:
    """DCGAN's draws (arXiv 1511.06434)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, BatchNorm | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
