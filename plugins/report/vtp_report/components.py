"""First three principal components of patch features and of the latent, as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtp_report.pictures import Picture, layout_width, picture
from vtp_report.samples import drawn, query_split

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.protocols import Bench


@dataclass(frozen=True, slots=True)
class Components:
    """Columns of image, patch features and latent; the shares of variance that three components hold."""

    split: str
    grid: str
    columns: list[tuple[Picture, Picture, Picture]]
    patches_share: float
    latent_share: float


def components(tokenizer: Any, bench: Bench, samples: int, seed: int) -> Components:
    """Components fitted over all places of all samples shown, so that one colour means one thing."""
    import torch

    split = query_split(bench)
    found = drawn(bench, split, samples, seed, "components")
    images = torch.stack(list(found.values())).to(bench.device)
    latent = tokenizer.encode(images)  # (B, C, h, w)
    features = tokenizer.features(images).patches  # (B, N, D)
    features = features.transpose(1, 2).unflatten(-1, latent.shape[-2:])  # (B, N, D) -> (B, D, h, w)
    patches_rgb, patches_share = principal_colours(features)
    latent_rgb, latent_share = principal_colours(latent)
    width = layout_width(images[0])
    columns = [
        (
            picture(image, f"sample {index}"),
            picture(patches, f"components of patch features, sample {index}", width),
            picture(code, f"components of the latent, sample {index}", width),
        )
        for index, image, patches, code in zip(found, images, patches_rgb, latent_rgb, strict=True)
    ]
    grid = " × ".join(str(side) for side in latent.shape[-2:])
    return Components(split, grid, columns, patches_share, latent_share)


def principal_colours(x: Tensor) -> tuple[Tensor, float]:
    """x (B, C, h, w) to colours (B, 3, h, w) in [0, 1], and the share of variance they hold.

    A component's sign is such that its largest loading is positive; its 2nd to 98th percentile fill [0, 1].
    """
    import torch

    rows = x.detach().double().cpu().movedim(1, -1)  # (B, C, h, w) -> (B, h, w, C)
    flat = rows.flatten(0, -2)  # (M, C)
    flat = flat - flat.mean(0)
    variance, basis = torch.linalg.eigh(flat.T @ flat)  # rising variance
    basis = basis[:, -3:].flip(1)  # (C, 3)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    places = flat @ basis  # (M, 3)
    low, high = torch.quantile(places, torch.tensor([0.02, 0.98], dtype=places.dtype), dim=0)
    colours = ((places - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = float(variance[-3:].sum() / variance.sum().clamp_min(1e-12))
    if colours.shape[1] < 3:  # fewer channels than colours
        colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    return colours.unflatten(0, rows.shape[:-1]).movedim(-1, 1).float(), share
