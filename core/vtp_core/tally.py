"""The numbers of a step: they stay on the device until one read-back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vtp_core import distributed


def finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN."""
    return value - value == 0.0


class Tally:
    """Sums by name over evaluations, means over micro-batches and processes.

    Args:
        micros: micro-batches per step.
    """

    def __init__(self, micros: int = 1) -> None:
        self.micros = micros
        self._tensors: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Note a scalar; a plain number costs no device."""
        if isinstance(value, Tensor):
            value = value.detach()
            self._tensors[name] = self._tensors[name] + value if name in self._tensors else value
        else:
            self._numbers[name] = self._numbers.get(name, 0.0) + value

    def own(self) -> dict[str, float]:
        """What this process noted, without the others; costs a synchronisation."""
        tensors = {name: float(value) for name, value in self._tensors.items()}
        return {name: value / self.micros for name, value in (tensors | self._numbers).items()}

    def read(self, norms: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Everything noted, and ``norms`` as they are; the only synchronisation of a step."""
        numbers = {name: value / self.micros for name, value in self._numbers.items()}
        found = {**self._tensors, **(norms or {})}
        if not found:
            return numbers
        device, dtype = next(iter(found.values())).device, torch.float32
        for value in found.values():
            dtype = torch.promote_types(dtype, value.dtype)
        stacked = torch.stack([value.to(device, dtype) for value in found.values()])
        values = distributed.mean_over_processes(stacked).tolist()
        row = {n: v / (self.micros if n in self._tensors else 1) for n, v in zip(found, values, strict=True)}
        return row | numbers
