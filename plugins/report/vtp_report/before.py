"""Reconstructions before and after a stage that trains an earlier tokenizer on, close up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp_report.pictures import Picture, picture
from vtp_report.record import AbsentError, Record
from vtp_report.samples import drawn, query_split

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench

SHARE = 1 / 2  # of a side that a crop shows


@dataclass(frozen=True, slots=True)
class Closeup:
    """One sample: the whole original, and a crop of it, before and after; PSNR of the whole, dB."""

    whole: Picture
    original: Picture
    before: Picture
    after: Picture
    psnr_before: float
    psnr_after: float


@dataclass(frozen=True, slots=True)
class Before:
    """The samples, their split, the run the stage began with, and what it trained."""

    split: str
    source: str
    retrained: tuple[str, ...]
    closeups: list[Closeup]


def before(record: Record, tokenizer: Any, bench: Bench, samples: int, seed: int) -> Before:
    """Crops at the place with most detail in the original.

    Raises:
        AbsentError: the earlier run is gone.
    """
    import torch

    from vtp_core.run.environment import masked
    from vtp_core.tokenizer import Tokenizer

    stage = record.stage
    source = str(masked(stage.source))
    if not Path(stage.source).exists():
        raise AbsentError(f"the run this stage began with is no longer at {source}")
    earlier = Tokenizer.from_pretrained(
        stage.source, stage.weights, device=str(bench.device), registry=record.registry
    )
    split = query_split(bench)
    found = drawn(bench, split, samples, seed, "before")
    originals = torch.stack(list(found.values())).to(bench.device)
    decoded = [one.decode(one.encode(originals)).float().clamp(0, 1).cpu() for one in (earlier, tokenizer)]
    closeups = [
        _closeup(place, x, y, z) for place, x, y, z in zip(found, originals.cpu(), *decoded, strict=True)
    ]
    return Before(split, source, stage.retrained, closeups)


def _closeup(place: int, x: Tensor, y: Tensor, z: Tensor) -> Closeup:
    top, left, high, wide = detailed(x)
    window = (..., slice(top, top + high), slice(left, left + wide))
    return Closeup(
        whole=picture(x, f"original of sample {place}"),
        original=picture(x[window], f"crop of sample {place}"),
        before=picture(y[window], f"crop of sample {place}, before"),
        after=picture(z[window], f"crop of sample {place}, after"),
        psnr_before=_psnr(x, y),
        psnr_after=_psnr(x, z),
    )


def detailed(x: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the crop of x (ch, h, w) with the largest variation between neighbours."""
    from torch.nn.functional import avg_pool2d, pad

    high, wide = (max(1, round(SHARE * side)) for side in x.shape[-2:])
    across = pad((x[..., 1:] - x[..., :-1]).abs(), (0, 1))
    down = pad((x[..., 1:, :] - x[..., :-1, :]).abs(), (0, 0, 0, 1))
    energy = avg_pool2d((across + down).mean(0, keepdim=True)[None], (high, wide), stride=1)[0, 0]
    top, left = divmod(int(energy.argmax()), energy.shape[1])
    return top, left, high, wide


def _psnr(x: Tensor, y: Tensor) -> float:
    return float(-10 * (x - y).square().mean().clamp_min(1e-10).log10())
