"""Latent statistics: what generators see latents through, computed once when a tokenizer is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_core.shards import whole

if TYPE_CHECKING:
    from vtp_core.tokenizer import Tokenizer
    from vtp_plugins.protocols import Bench

ENCODING = ("encoder.", "bottleneck.")
"""Prefixes of the tokenizer's tensors that a latent depends on."""


@torch.no_grad()
def latent_statistics(tokenizer: Tokenizer, bench: Bench, limit: int = 10_000) -> dict[str, Tensor]:
    """Mean and std of the raw latent by channel over the trained split.

    Returns:
        ``mean`` and ``std`` (C,) float32, Bessel-corrected over images and places (specs/vtp.md 5.5; a channel
        that never moves has std 1); ``count``, the images behind them; ``of`` and ``data``, (32,) uint8:
        the :func:`digest` of the tokenizer and the hash of the data.
    """
    total = torch.zeros(2, tokenizer.spec.channels, dtype=torch.float64)
    images = places = 0
    for batch in bench.images(bench.splits[0]):
        z = tokenizer.encode(batch[: limit - images]).double().cpu()
        flat = z.transpose(0, 1).flatten(1)  # (B, C, *grid) -> (C, B*N)
        total += torch.stack([flat.sum(1), flat.square().sum(1)])
        images, places = images + len(z), places + flat.shape[1]
        if images >= limit:
            break
    mean = total[0] / places
    std = ((total[1] - places * mean**2).clamp(min=0) / max(places - 1, 1)).sqrt()
    data = hashlib.sha256(bench.dataset(bench.splits[0]).fingerprint().encode())
    return {
        "mean": mean.float(),
        "std": torch.where(std > 0, std, 1.0).float(),
        "count": torch.tensor(images),
        "of": digest(tokenizer.state_dict()),
        "data": _bytes(data.digest()),
    }


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """What tells one latent space from another: sha256 of the encoder's and the bottleneck's tensors.

    Fractions are hashed in float32, which tokenizers run in, so that the precision of a file changes nothing.

    Args:
        tensors: of a tokenizer by name (``encoder...``, ``bottleneck...``), in any order; others don't count.

    Returns:
        (32,) uint8, over names, types, shapes and bytes.
    """
    return hashed({name: tensor for name, tensor in tensors.items() if name.startswith(ENCODING)})


def hashed(tensors: Mapping[str, Tensor]) -> Tensor:
    """sha256 over all tensors, (32,) uint8, as :func:`digest` takes it."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = whole(tensors[name]).detach()
        tensor = tensor.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        total.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # in place
    return _bytes(total.digest())


def check(
    statistics: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    what: str = "the latent statistics",
    remedy: str = "take both from one run: tokenizer.from=RUN, and vtp latents RUN -o DIR writes its latents",
) -> None:
    """Hold statistics against the tokenizer whose latents they are to standardise.

    Args:
        statistics: ``mean``, ``std``, and ``of`` where they know whose they are.
        tensors: of the tokenizer, as :func:`digest` takes them.
        what: names the statistics, or the latents that they come with, in the message.
        remedy: what to do about it.

    Raises:
        DataFault: there are none, they are broken, or they belong to another tokenizer.
    """
    if not {"mean", "std"} <= statistics.keys():
        raise DataFault(f"{what}: no mean and std; the end of a run computes them: vtp resume RUN")
    mean, std = statistics["mean"], statistics["std"]
    if mean.shape != std.shape or not mean.isfinite().all() or not (std.isfinite() & (std > 0)).all():
        raise DataFault(f"{what}: mean and std are not finite with std > 0, or differ in shape; {remedy}")
    if "of" not in statistics:
        return
    theirs, ours = hexed(statistics["of"]), hexed(digest(tensors))
    if theirs != ours:
        raise DataFault(
            f"{what} belong to the tokenizer {theirs[:12]}, not to {ours[:12]}: another one, or it was trained "
            f"on since; {remedy}"
        )


def hexed(value: Tensor) -> str:
    """A digest as 64 hexadecimal digits."""
    return bytes(value.cpu().tolist()).hex()


def unhexed(digits: str) -> Tensor:
    """The inverse of :func:`hexed`.

    Raises:
        ValueError: these are not 64 hexadecimal digits.
    """
    value = bytes.fromhex(digits)
    if len(value) != 32:
        raise ValueError(f"{digits!r} is no sha256")
    return _bytes(value)


def _bytes(value: bytes) -> Tensor:
    return torch.tensor(list(value), dtype=torch.uint8)
