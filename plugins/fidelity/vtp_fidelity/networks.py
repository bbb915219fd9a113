"""Feature networks and what numbers in their features are called; only Inception's are FID, KID and IS."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vtp_core import weights
from vtp_core.nn.lite0 import Lite0, load
from vtp_fidelity.extractor import features as lite0_features

Features = Literal["lite0", "inception"]
Layer = Literal["block10", "pool"]
Metric = Literal["fd", "kid", "is", "pr"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Network(Protocol):
    """A frozen network that turns uint8 images into features."""

    names: Mapping[str, str]
    """What ``fd kid is precision recall`` are called in these features."""

    @property
    def described(self) -> str:
        """Network, layer, dimensions and resize, for protocols."""
        ...

    @property
    def scorer(self) -> str:
        """Network and resize behind the Inception Score's classes, for protocols."""
        ...

    def __call__(self, images: Tensor, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) of uint8 images (B, 3, H, W), and class logits (B, classes) where asked; on the CPU."""
        ...


class Lite0Network:
    """EfficientNet-Lite0.

    Args:
        layer: ``block10`` (112-d, for hundreds of images) or ``pool`` (1280-d, for tens of thousands).
        size: short side the network sees, in pixels.
        device: where it runs.

    Raises:
        DataFault: the weights ``lite0`` are missing.
    """

    names: Mapping[str, str] = {
        "fd": "fd_lite0", "kid": "kid_lite0", "is": "is_lite0",
        "precision": "precision_lite0", "recall": "recall_lite0",
    }  # fmt: skip

    def __init__(self, layer: Layer = "block10", size: int = 96, device: torch.device | str = "cpu") -> None:
        self.network, self.layer, self.size = load(weights.path("lite0")).to(device), layer, size
        self.device = torch.device(device)

    @property
    def described(self) -> str:
        return f"EfficientNet-Lite0 {self.layer} {Lite0.widths[self.layer]}-d at {self.size} px"

    @property
    def scorer(self) -> str:
        return f"EfficientNet-Lite0, 1000 classes at {self.size} px"

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        images = images.to(self.device)
        found = lite0_features(self.network, images, self.layer, self.size).cpu()
        return found, lite0_features(self.network, images, "logits", self.size).cpu() if logits else None


class InceptionNetwork:
    """torch-fidelity's Inception of 2015, whose features define FID.

    Raises:
        DataFault: the weights ``inception`` are missing; no package carries them.
    """

    names: Mapping[str, str] = {
        "fd": "fid", "kid": "kid", "is": "inception_score", "precision": "precision", "recall": "recall",
    }  # fmt: skip
    described = "Inception 2015-12-05 pool 2048-d at 299 px as TensorFlow 1 resizes"
    scorer = "Inception 2015-12-05, 1008 classes, no bias"
    rows: ClassVar[int] = 32

    def __init__(self, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles whatever is in the file; so it gets one that was read and written as tensors
        state = torch.load(weights.path("inception"), map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        self.network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        ).to(device)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        parts = [self.network(part.to(self.device)) for part in images.split(self.rows)]
        found = [torch.cat(values).cpu() for values in zip(*parts, strict=True)]
        return found[0], found[1] if logits else None


def network(
    features: Features = "lite0",
    layer: Layer | None = None,
    size: int = 96,
    device: torch.device | str = "cpu",
) -> Network:
    """A feature network.

    Args:
        features: ``lite0`` or ``inception``.
        layer: of lite0; without it ``block10``.
        size: short side that lite0 sees.
        device: where it runs.

    Raises:
        DataFault: its weights are missing.
    """
    if features == "inception":
        return InceptionNetwork(device)
    return Lite0Network(layer or "block10", size, device)


@dataclass(frozen=True, slots=True)
class Extracted:
    """Features (n, D) of a set, and its class logits (n, classes) where the Inception Score wants them."""

    points: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        return len(self.points)


def extracted(network: Network, batches: Iterable[Tensor], logits: bool = False) -> Extracted:
    """Features of all uint8 batches (B, 3, H, W)."""
    parts = [network(images, logits) for images in batches]
    if not parts:
        return Extracted(torch.empty(0, 1))
    scores = [part[1] for part in parts if part[1] is not None]
    return Extracted(torch.cat([part[0] for part in parts]), torch.cat(scores) if scores else None)
