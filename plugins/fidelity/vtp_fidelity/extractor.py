"""EfficientNet-Lite0 as a feature extractor that torch-fidelity knows by name, ``vtp-lite0``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_core import weights
from vtp_core.nn.lite0 import Lite0, load

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "vtp-lite0"


def features(network: Lite0, images: Tensor, layer: str, size: int) -> Tensor:
    """Pooled features (B, D) of uint8 images (B, 3, H, W), whose short side is resized to ``size``."""
    x = images.float() / 255
    scale = size / min(x.shape[-2:])
    if scale != 1:
        sides = tuple(round(side * scale) for side in x.shape[-2:])
        x = F.interpolate(x, sides, mode="bilinear", antialias=True, align_corners=False)
    x = x.contiguous(memory_format=torch.channels_last)
    # small parts stay in a CPU's cache: half the time of 128 images at once
    return torch.cat([network(part, layer) for part in x.split(16 if x.device.type == "cpu" else len(x))])


@cache
def register() -> type[Any]:
    """Make ``feature_extractor="vtp-lite0"`` known to torch-fidelity; gives the class."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Lite0Extractor(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity ships no types
        """Features ``block10``, ``pool`` and ``logits`` of images resized to 96 pixels, or to ``size``."""

        def __init__(
            self,
            name: str,
            features_list: Sequence[str],
            feature_extractor_weights_path: str | Path | None = None,
            size: int = 96,
            **_: Any,
        ) -> None:
            super().__init__(name, features_list)
            self.network = load(Path(feature_extractor_weights_path or weights.path("lite0")))
            self.size = size

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "block10", "pool", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "block10"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(2, 3, 96, 96, dtype=torch.uint8)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return tuple(features(self.network, images, layer, self.size) for layer in self.features_list)

    torch_fidelity.register_feature_extractor(NAME, Lite0Extractor)
    return Lite0Extractor
