"""What a step reads, on the device: views, raw fields and masks, each moved and normalised once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_plugins.protocols import Modality


@dataclass(slots=True)
class Inputs:
    """What a step reads: of this process, in the order of the batch.

    Attributes:
        views: (R, K, ...) as the loader made them, or (R, ...) for views without crops.
        fields: raw fields, tensors (R, ...) or lists.
        masks: (K, R, N) bool on the CPU, by sampler.
        ids: sample indices of a whole step's rows, (R,), where they are known.
    """

    views: dict[str, Tensor]
    fields: dict[str, Any]
    masks: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None


class Signals:
    """The inputs of one micro-batch as modules read them.

    Args:
        inputs: from the loader, with masks.
        modality: normalises.
        patch: stride of a token along each axis.
        device: where to compute.
        dtype: of signals.
        crop_free: views without a crop axis.
    """

    def __init__(
        self,
        inputs: Inputs,
        modality: Modality,
        patch: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        crop_free: frozenset[str],
    ) -> None:
        self.inputs, self.modality, self.patch = inputs, modality, patch
        self.device, self.dtype, self.crop_free = device, dtype, crop_free
        self._signals: dict[str, Tensor] = {}
        self._fields: dict[str, Any] = {}
        self._masks: dict[str, Tensor] = {}
        self._places: dict[tuple[str, int], Tensor] = {}

    def view(self, name: str) -> Tensor:
        """A view as the loader made it."""
        found: Tensor = _known(self.inputs.views, name)
        return found

    def bare(self, name: str) -> bool:
        """Whether a name stands for a raw field or a view without crops, which come as (R, ...)."""
        return name in self.crop_free or name not in self.inputs.views

    def crops(self, name: str) -> int:
        """K of a view; a latent that the dataset supplies has one crop."""
        return 1 if self.bare(name) else self.view(name).shape[1]

    def grid(self, name: str) -> tuple[int, ...]:
        """Tokens along each axis of a view, or of what is supplied in its place; empty for anything else."""
        if not self.bare(name):
            return tuple(s // p for s, p in zip(self.view(name).shape[3:], self.patch, strict=True))
        supplied = name == "latent" or name.startswith("teacher:")
        return tuple(self.field("latent").shape[2:]) if supplied and "latent" in self.inputs.fields else ()

    def signal(self, name: str) -> Tensor:
        """A view as encoders read it, (R*K, ch, *size); one without crops as it is, (R, ...)."""
        if name not in self._signals:
            raw = self.view(name).to(self.device, non_blocking=True)
            if name not in self.crop_free:
                raw = self.modality.normalise(raw.flatten(0, 1)).to(self.dtype)  # (R, K, ...) -> (R*K, ...)
            self._signals[name] = raw
        return self._signals[name]

    def field(self, name: str) -> Any:
        """A raw field, (R, ...) or a list; fractions have the run's precision."""
        if name not in self._fields:
            raw = _known(self.inputs.fields, name)
            if isinstance(raw, Tensor):
                raw = raw.to(
                    self.device, self.dtype if raw.is_floating_point() else raw.dtype, non_blocking=True
                )
            self._fields[name] = raw
        return self._fields[name]

    def mask(self, name: str) -> Tensor:
        """A sampler's mask on the device, (K, R, N) bool."""
        if name not in self._masks:
            self._masks[name] = self.inputs.masks[name].to(self.device, non_blocking=True)
        return self._masks[name]

    def places(self, name: str, rows: int) -> Tensor:
        """Flat places (r*K + k)*N + n that the first rows hide, in the order of ``patches[mask]``; (M,)."""
        if (name, rows) not in self._places:
            shown = self.inputs.masks[name][:, :rows]
            crops, _, tokens = shown.shape
            k, r, n = shown.nonzero().unbind(1)  # found on the CPU: no synchronisation with the device
            self._places[name, rows] = ((r * crops + k) * tokens + n).to(self.device)
        return self._places[name, rows]

    def within(self, name: str, most: int, rows: int) -> Tensor:
        """Which of the places of ``most`` rows lie in the first ``rows``; (M,) bool."""
        return (self.inputs.masks[name][:, :most].nonzero()[:, 1] < rows).to(self.device)


def _known(found: Mapping[str, Any], name: str) -> Any:
    if name not in found:
        raise DataFault(
            f"the batch has no {name!r}, which the step reads; it has {', '.join(sorted(found)) or 'nothing'}"
        )
    return found[name]
