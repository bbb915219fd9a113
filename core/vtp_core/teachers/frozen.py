"""What frozen teachers of pictures share: their own resize and normalisation, no gradient, full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core import weights as registry
from vtp_core.converting.files import read, state_dict
from vtp_core.converting.values import check_values
from vtp_core.errors import DataFault, StackFault
from vtp_core.nn.chunked import wide
from vtp_core.weights_towers import Library
from vtp_plugins.importing import Mismatch, check_tensors
from vtp_plugins.spec import Spec

Interpolation = Literal["bicubic", "bilinear"]
Normalise = Literal["own", "signed", "none"]
SIGNED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Frozen(nn.Module):
    """A teacher; what differs is :meth:`features`.

    Args:
        spec: tells the tokenizer's patch.
        width: D.
        stride: pixels of one of its tokens, of what it reads.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks; published code doesn't.
        mean: of the channels of a picture in [0, 1], taken out.
        deviation: likewise.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        width: int,
        stride: tuple[int, int],
        size: int | tuple[int, int] | None = None,
        interpolation: Interpolation = "bicubic",
        antialias: bool = False,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        deviation: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        if spec.modality != "image":
            raise ValueError(f"modality {spec.modality!r}: this teacher reads images")
        self.width, self.stride, self.patch = width, stride, spec.patch
        self.size = (size, size) if isinstance(size, int) else size
        self.interpolation, self.antialias = interpolation, antialias
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Frozen:
        """A teacher stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor, *, want: frozenset[str]) -> dict[str, Tensor]:
        """Features of pictures in [0, 1], float32 at least.

        Args:
            x: (B, 3, H, W).
            want: ``cls`` (B, D), ``patches`` (B, N, D) and, of a ViT, ``hidden:k`` (B, N, D) after block k.

        Raises:
            StackFault: an output that it doesn't give.
        """
        found = self.features(self.prepared(x), want)
        missing = sorted(want - set(found))
        if missing:
            raise StackFault(
                f"teacher {type(self).__name__} gives no {missing[0]!r}; it gives {', '.join(sorted(found))}"
            )
        return {name: wide(found[name]) for name in want}

    def prepared(self, x: Tensor) -> Tensor:
        """Pictures as its network reads them."""
        height, width = self.size or self._matching(x)
        x = x.to(self.mean.dtype)
        if tuple(x.shape[2:]) != (height, width):
            x = F.interpolate(
                x,
                size=(height, width),
                mode=self.interpolation,
                align_corners=False,
                antialias=self.antialias,
            )
        return (x - self.mean) / self.deviation

    def _matching(self, x: Tensor) -> tuple[int, int]:
        """The size at which a token of the tokenizer is a token of the teacher."""
        sides = zip(x.shape[2:], self.patch, self.stride, strict=True)
        height, width = (max(side // patch, 1) * stride for side, patch, stride in sides)
        return height, width

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """Outputs, at least those wanted, of what :meth:`prepared` gave."""
        raise NotImplementedError


def constants(
    normalise: Normalise, own: tuple[Sequence[float], Sequence[float]]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation: the model's own, those that make [-1, 1] of [0, 1], or those that change nothing."""
    return {"own": own, "signed": SIGNED, "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}[normalise]


def check_size(size: int | tuple[int, int] | None, patch: int) -> None:
    """Refuse a size that a ViT can't cut into patches.

    Raises:
        ValueError: it is no multiple of the patch.
    """
    for side in (size,) if isinstance(size, int) else size or ():
        if side % patch or side < patch:
            raise ValueError(f"size: {side} is not a multiple of the teacher's patch of {patch} pixels")


def hidden_levels(want: frozenset[str]) -> dict[str, int]:
    """The blocks k whose ``hidden:k`` is wanted."""
    names = (name for name in want if name.startswith("hidden:") and name[7:].isdecimal())
    return {name: int(name[7:]) for name in names}


def is_meta() -> bool:
    """Whether shapes alone are built, as ``vtp plan`` does: then no weights are read."""
    return torch.empty(0).is_meta


def file_of(library: Library, name: str, weights: str | None, allow_random: bool) -> Path | None:
    """The file with a model's weights; None for random ones, and where shapes alone are built.

    Args:
        library: that names the model.
        name: of the model, with or without the tag of its weights.
        weights: a file, ``random``, or None for the one that ``vtp weights import`` brought.
        allow_random: says that this is a test.

    Raises:
        ValueError: random weights without ``allow_random``.
        DataFault: there is no such file, or it is not the one that was imported.
    """
    if weights == "random" and not allow_random:
        raise ValueError("weights: random teaches nothing; for a test, set allow_random: true")
    if weights == "random" or is_meta():
        return None
    if weights is None:
        return registry.tower(library, name)
    file = Path(weights).expanduser()
    if not file.is_file():
        raise DataFault(
            f"teacher {name!r} of {library}: there is no file {file}; without the option 'weights' it is the one "
            f"that is imported:\n  vtp weights import {name} --from FILE"
        )
    return file


def load_into(network: nn.Module, file: Path, beside: Sequence[str] = (), below: str = "") -> None:
    """Load a network strictly.

    Args:
        network: as it was drawn; gets the tensors.
        file: safetensors, or a torch state dict, which is read without running code.
        beside: prefixes of tensors that the file may hold and the network doesn't have.
        below: prefix of the names that are the network's, others are passed over.

    Raises:
        DataFault: the file can't be read.
        Mismatch: it holds other tensors, or values that no training leaves behind.
    """
    tensors = state_dict(read(file), file).tensors
    own = {k.removeprefix(below): v for k, v in tensors.items() if k.startswith(below)}
    own = {k: v for k, v in own.items() if not k.startswith(tuple(beside))}
    new = network.state_dict()
    counters = {name for name in new if name.endswith("num_batches_tracked")}  # which nothing reads
    try:
        check_tensors(
            *({k: tuple(t.shape) for k, t in side.items() if k not in counters} for side in (own, new))
        )
        check_values(own, lambda: new)
    except Mismatch as error:
        raise Mismatch(f"{file} holds other weights than this model's\n{error}") from error
    network.load_state_dict({**{name: new[name] for name in counters}, **own})
