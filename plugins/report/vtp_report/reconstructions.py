"""Originals beside what the tokenizer makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_report.pictures import Picture, picture
from vtp_report.samples import drawn

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench

GAIN = 4.0  # of the picture of differences


@dataclass(frozen=True, slots=True)
class Pair:
    """One sample: three pictures and the PSNR of the second against the first, dB."""

    original: Picture
    reconstruction: Picture
    difference: Picture
    psnr: float


def reconstructions(tokenizer: Any, bench: Bench, samples: int, seed: int) -> dict[str, list[Pair]]:
    """Pairs of every split."""
    return {split: _split(tokenizer, bench, split, samples, seed) for split in bench.splits}


def _split(tokenizer: Any, bench: Bench, split: str, samples: int, seed: int) -> list[Pair]:
    import torch

    found = drawn(bench, split, samples, seed, "reconstructions")
    originals = torch.stack(list(found.values()))
    decoded = tokenizer.decode(tokenizer.encode(originals.to(bench.device)))
    return [
        _pair(index, x, y)
        for index, x, y in zip(found, originals, decoded.float().clamp(0, 1).cpu(), strict=True)
    ]


def _pair(index: int, x: Tensor, y: Tensor) -> Pair:
    error = (x - y).square().mean().clamp_min(1e-10)
    return Pair(
        original=picture(x, f"original of sample {index}"),
        reconstruction=picture(y, f"reconstruction of sample {index}"),
        difference=picture((x - y).abs() * GAIN, f"difference, sample {index}"),
        psnr=float(-10 * error.log10()),
    )
