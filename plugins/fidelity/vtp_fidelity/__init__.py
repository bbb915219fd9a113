"""FD-lite0: Fréchet distance of reconstructions in the features of EfficientNet-Lite0. It is not FID."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vtp_core import weights
from vtp_core.probes import LeftOut, up_to
from vtp_fidelity.extractor import features
from vtp_fidelity.frechet import frechet_distance
from vtp_core.nn.lite0 import Lite0, load
from vtp_plugins import Reading, Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench

__all__ = ["FDLite0", "Lite0", "frechet_distance"]


class FDLite0:
    """Fréchet distance between originals and their reconstructions, with its split-half floor beside it.

    The floor is the distance between two random halves of the originals: what n / 2 samples a side give
    where there is no difference. A distance is paired (the same n images on both sides), so it can lie
    below the floor; numbers of different n, size or layer don't compare.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them all but the one that is trained on.
        limit: images per split, the first so many of the bench.
        layer: ``block10`` (112-d, for hundreds of images) or ``pool`` (1280-d, for tens of thousands).
        size: short side the network sees, in pixels; without it the stack's, 96 at least.
        seed: of the halves.
    """

    fields: frozenset[str] = frozenset()

    def __init__(
        self,
        spec: Spec,
        *,
        splits: tuple[str, ...] = (),
        limit: int = 500,
        layer: Literal["block10", "pool"] = "block10",
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        if spec.modality != "image":
            raise ValueError(f"probes.fd_lite0 measures images; the stack's modality is {spec.modality}")
        self.splits, self.limit, self.layer, self.seed = splits, limit, layer, seed
        self.size = size or max(96, min(spec.size))

    @torch.no_grad()
    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        network = load(weights.path("lite0")).to(bench.device)
        out: list[Reading] = []
        for split in self.splits or bench.splits[1:] or bench.splits:
            out += self._split(network, bench, split)
        return out

    def _split(self, network: Lite0, bench: Bench, split: str) -> list[Reading]:
        real, fake = [], []
        for original, reconstruction in up_to(self.limit, bench.reconstructions(split)):
            real.append(self._features(network, original))
            fake.append(self._features(network, reconstruction))
        a, b = torch.cat(real), torch.cat(fake)
        try:
            return self._readings(split, a, b)
        except ArithmeticError as error:
            raise LeftOut(f"split {split}: {error}") from error

    def _features(self, network: Lite0, images: Tensor) -> Tensor:
        pixels = (images * 255).round().to(torch.uint8)
        return features(network, pixels, self.layer, self.size).cpu()

    def _readings(self, split: str, a: Tensor, b: Tensor) -> list[Reading]:
        n, half = len(a), len(a) // 2
        places = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        floor = frechet_distance(a[places[:half]], a[places[half : 2 * half]])
        distance = frechet_distance(a, b)
        net = (
            f"EfficientNet-Lite0 {self.layer} {a.shape[1]}-d at {self.size} px, uint8 rounded, torch-fidelity"
        )
        return [
            Reading(
                "fd_lite0",
                split,
                distance,
                n,
                f"originals against their reconstructions | {net} | floor {floor:.1f}",
            ),
            Reading(
                "fd_lite0/floor", split, floor, half, f"two halves of the originals, seed {self.seed} | {net}"
            ),
        ]
