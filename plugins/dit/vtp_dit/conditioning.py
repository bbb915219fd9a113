"""Embeddings of time and condition: DiT (arXiv 2212.09748), Gaussian Fourier features (RAE, arXiv 2510.11690)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_dit.switches import Time
from vtp_plugins.spec import Spec

_WAVES = {"sincos": 128, "fourier": 256}


class TimeEmbedding(nn.Module):
    """fc2(silu(fc1(waves(t)))).

    Args:
        width: D.
        kind: ``sincos``: [cos, sin] of t times P ** (-i / 128); ``fourier``: [sin, cos] of 2 pi t W, W drawn once
            from N(0, 1) and never trained.
        max_period: P.
    """

    frequencies: Tensor

    def __init__(self, width: int, kind: Time, max_period: float) -> None:
        super().__init__()
        self.kind, self.max_period = kind, max_period
        if kind == "fourier":
            self.register_buffer("frequencies", torch.randn(_WAVES[kind]))
        self.fc1 = nn.Linear(2 * _WAVES[kind], width)
        self.fc2 = nn.Linear(width, width)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def waves(self, t: Tensor) -> Tensor:
        """Times (R,) to features (R, 256), or (R, 512) of ``fourier``."""
        if self.kind == "fourier":
            angles = t[:, None] * self.frequencies.to(t.dtype) * (2 * math.pi)
            return torch.cat([angles.sin(), angles.cos()], dim=1)
        count = _WAVES[self.kind]
        steps = torch.arange(count, dtype=t.dtype, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(self.max_period) * steps / count)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        """Times (R,) in float32 at least to (R, D)."""
        return self.fc2(F.silu(self.fc1(self.waves(t).to(self.fc1.weight.dtype))))  # type: ignore[no-any-return]


class Labels(nn.Module):
    """A table of classes and, last, the null class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(
                "condition: 'label' needs a dataset with labels; name another condition, or none"
            )
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Any) -> Tensor:
        """Labels (R,) int64 to (R, D)."""
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(f"condition: labels (R,) of whole numbers are wanted, not {_told(labels)}")
        return self.table(labels)  # type: ignore[no-any-return]


class Embeddings(nn.Module):
    """A linear map of given embeddings; the zero vector is the null condition, its image is the bias."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        if given < 1:
            raise ValueError("condition: the width of the conditioning embedding is unknown")
        self.proj = nn.Linear(given, width)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, given: Any) -> Tensor:
        """Embeddings (R, E) to (R, D)."""
        wide = self.proj.in_features
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape[1:] != (wide,):
            raise ValueError(f"condition: embeddings (R, {wide}) are wanted, not {_told(given)}")
        return self.proj(given.to(self.proj.weight.dtype))  # type: ignore[no-any-return]


def condition_of(spec: Spec, width: int) -> Labels | Embeddings | None:
    """What embeds the condition that ``spec`` names; None without one."""
    if spec.condition == "label":
        return Labels(spec.classes, width)
    if spec.condition == "embedding":
        return Embeddings(spec.condition_width, width)
    if spec.condition:
        raise ValueError(f"condition: {spec.condition!r} is neither 'label' nor 'embedding'")
    return None


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
