"""FD-lite0: Fréchet distance of reconstructions in the features of EfficientNet-Lite0. It is not FID."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_core.probes import LeftOut, up_to
from vtp_fidelity.frechet import frechet_distance
from vtp_fidelity.networks import Layer, Lite0Network
from vtp_fidelity.pixels import to_bytes
from vtp_plugins import Reading, Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


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
        layer: Layer = "block10",
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        if spec.modality != "image":
            raise ValueError(f"probes.fd_lite0 measures images; the stack's modality is {spec.modality}")
        self.splits, self.limit, self.layer, self.seed = splits, limit, layer, seed
        self.size = size or max(96, min(spec.size))

    @torch.no_grad()
    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        network = Lite0Network(self.layer, self.size, bench.device)
        out: list[Reading] = []
        for split in self.splits or bench.splits[1:] or bench.splits:
            try:
                out += self._split(network, bench, split)
            except ArithmeticError as error:
                raise LeftOut(f"split {split}: {error}") from error
        return out

    def _split(self, network: Lite0Network, bench: Bench, split: str) -> list[Reading]:
        real, fake = [], []
        for original, reconstruction in up_to(self.limit, bench.reconstructions(split)):
            real.append(network(to_bytes(original))[0])
            fake.append(network(to_bytes(reconstruction))[0])
        return self._readings(network, split, torch.cat(real), torch.cat(fake))

    def _readings(self, network: Lite0Network, split: str, a: Tensor, b: Tensor) -> list[Reading]:
        n, half = len(a), len(a) // 2
        floor = halves(a, self.seed)
        net = f"{network.described}, uint8 rounded, torch-fidelity"
        paired = f"{n} originals against their reconstructions | {net} | floor {floor:.1f}"
        split_half = f"two halves of {n} originals, seed {self.seed} | {net}"
        return [
            Reading("fd_lite0", split, frechet_distance(a, b), n, paired),
            Reading("fd_lite0/floor", split, floor, half, split_half),
        ]


def halves(features: Tensor, seed: int) -> float:
    """Fréchet distance between two random halves of features (n, D): the floor of n / 2 samples a side."""
    places, half = (
        torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)),
        len(features) // 2,
    )
    return frechet_distance(features[places[:half]], features[places[half : 2 * half]])
