"""Layers of the convolutional autoencoder: residual blocks, attention over the map, resampling.

Names of parameters are those of CompVis/latent-diffusion's checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of every group norm


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), with a 1x1 convolution of x where the channels change.

    Args:
        inputs: channels in.
        outputs: channels out.
        groups: of the norms.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """x + attention(norm x) of one head over all places of the map.

    Args:
        channels: C.
        groups: of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v)
        )  # (B, C, h, w) -> (B, 1, N, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)  # (B, 1, N, C) -> (B, C, N)
        return x + self.proj_out(h.unflatten(2, x.shape[2:]))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the side: a strided convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the side: every pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Blocks at one side of the map, each with attention behind it or none, then a change of the side.

    Args:
        inputs: channels in.
        outputs: channels out.
        blocks: residual blocks.
        groups: of the norms.
        attends: whether there is attention.
        resample: ``downsample``, ``upsample``, or empty for none.
    """

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, attends: bool, resample: str
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(inputs if index == 0 else outputs, outputs, groups) for index in range(blocks)
        )
        self.attn = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks if attends else 0))
        self.downsample = Downsample(outputs) if resample == "downsample" else None
        self.upsample = Upsample(outputs) if resample == "upsample" else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the latent's side.

    Args:
        channels: C.
        groups: of the norms.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups)
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]
