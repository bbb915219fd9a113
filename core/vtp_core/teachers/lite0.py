"""EfficientNet-Lite0 (arXiv 1905.11946) as a teacher: the map of one block; its real weights are installable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp_core import weights as registry
from vtp_core.nn.lite0 import Lite0
from vtp_core.teachers.frozen import Frozen, Interpolation, is_meta, load_into
from vtp_plugins.spec import Spec


class EfficientNetLite0(Frozen):
    """``patches`` are the map after one block, ``cls`` is their mean.

    Args:
        spec: tells the tokenizer's patch.
        block: 0 to 15; 4 has 40 channels at stride 8, 10 has 112 at stride 16, 15 has 320 at stride 32.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks.
        weights: those that ``vtp weights import lite0`` brought; ``random`` is for tests.
        allow_random: says that this is a test.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        block: Annotated[int, Field(ge=0, le=15)] = 10,
        size: int | tuple[int, int] | None = None,
        interpolation: Interpolation = "bicubic",
        antialias: bool = False,
        weights: Literal["lite0", "random"] = "lite0",
        allow_random: bool = False,
    ) -> None:
        if weights == "random" and not allow_random:
            raise ValueError("weights: random teaches nothing; for a test, set allow_random: true")
        network = Lite0()
        kept = network._blocks[: block + 1]
        stride = 2
        for module in kept.modules():
            if isinstance(module, nn.Conv2d):
                stride *= int(module.stride[0])
        super().__init__(
            spec, width=_width(kept[-1]), stride=(stride, stride), size=size,
            interpolation=interpolation, antialias=antialias,
            mean=(127 / 255,) * 3, deviation=(128 / 255,) * 3,
        )  # fmt: skip
        if weights == "lite0" and not is_meta():
            load_into(network, registry.path("lite0"))
        self.stem, self.norm, self.blocks = network._conv_stem, network._bn0, kept
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        return ("lite0",) if options["weights"] == "lite0" else ()

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """``patches`` (B, N, D) and ``cls`` (B, D)."""
        x = F.relu6(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        patches = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        return {"patches": patches, "cls": patches.mean(1)}


def _width(block: nn.Module) -> int:
    """Channels that a block gives."""
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels
