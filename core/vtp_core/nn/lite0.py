"""EfficientNet-Lite0: EfficientNet (arXiv 1905.11946) without squeeze-excite, with ReLU6."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

# repeats, kernel, stride, expansion, channels of each stage
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: the odd pixel goes right and down."""

    def forward(self, x: Tensor) -> Tensor:
        pad: list[int] = []
        for axis in (1, 0):
            size, stride, kernel = x.shape[axis - 2], self.stride[axis], self.kernel_size[axis]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pad))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(inputs, middle, 1, bias=False), _norm(middle)
        self._depthwise_conv = _Conv(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = _norm(middle)
        self._project_conv, self._bn2 = _Conv(middle, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        out: Tensor = x + y if self.skips else y
        return out


class Lite0(nn.Module):
    """The network under the names of its weights; ``forward`` gives pooled features.

    ``block10`` (112-d, after the last block of stride 16) suits hundreds of images, ``pool`` (1280-d,
    the usual place) tens of thousands; ``logits`` are ImageNet's 1000 classes.
    """

    widths: ClassVar[dict[str, int]] = {"block10": 112, "pool": 1280, "logits": 1000}

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(inputs, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor, layer: str = "block10") -> Tensor:
        """Features of images in [0, 1].

        Args:
            x: (B, 3, H, W), any size of 32 pixels or more.
            layer: a key of ``widths``.
        """
        x = F.relu6(self._bn0(self._conv_stem((x * 255 - 127) / 128)))
        for block in self._blocks[:11] if layer == "block10" else self._blocks:
            x = block(x)
        if layer == "block10":
            return x.mean((2, 3))  # (B, 112, h, w) -> (B, 112)
        x = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))  # (B, 320, h, w) -> (B, 1280)
        out: Tensor = self._fc(x) if layer == "logits" else x
        return out


def load(path: Path) -> Lite0:
    """The network with the weights of a safetensors file, frozen, in eval mode."""
    from safetensors.torch import load_file

    network = Lite0()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
