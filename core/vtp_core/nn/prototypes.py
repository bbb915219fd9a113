"""The prototype head of DINO and iBOT (DINOv2, arXiv 2304.07193): an MLP, a unit sphere, K prototypes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.nn.chunked import wide
from vtp_plugins.spec import Spec


class WeightNormed(nn.Module):
    """Prototypes as direction ``weight_v`` times length ``weight_g``.

    Args:
        prototypes: K.
        width: d.
    """

    def __init__(self, prototypes: int, width: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(nn.init.trunc_normal_(torch.empty(prototypes, width), std=0.02))

    @property
    def weight(self) -> Tensor:
        """Prototypes, (K, d)."""
        length: Tensor = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)  # (K, 1)
        return self.weight_v * (self.weight_g / length)


class PrototypeHead(nn.Module):
    """Features to scores of K prototypes; losses take :meth:`features` and ``weight`` apart, and chunk.

    Names of parameters are DINOv2's: ``mlp.*``, ``last_layer.weight_g`` and ``last_layer.weight_v``.

    Args:
        spec: shapes of the tokenizer.
        on: output that is read, for its width.
        prototypes: K.
        hidden: width of the MLP.
        bottleneck: d, width of the unit sphere.
        layers: linear layers of the MLP.
        weight_norm: learn length and direction of prototypes apart (DINOv2); else plain weights (DINOv3).
        batch_norm: normalise after each hidden layer.
        bias: of the MLP's layers.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"prototypes": 1024, "hidden": 256, "bottleneck": 64},
    }

    def __init__(
        self,
        spec: Spec,
        *,
        on: str = "cls",
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        weight_norm: bool = True,
        batch_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.prototypes = prototypes
        widths = [spec.width_of(on), *[hidden] * (layers - 1), bottleneck]
        chain: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            linear = nn.Linear(before, after, bias=bias)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
            chain.append(linear)
            if index < layers - 1:
                chain += [nn.BatchNorm1d(after), nn.GELU()] if batch_norm else [nn.GELU()]
        self.mlp = nn.Sequential(*chain) if len(chain) > 1 else chain[0]
        self.last_layer = (
            WeightNormed(prototypes, bottleneck)
            if weight_norm
            else nn.Linear(bottleneck, prototypes, bias=False)
        )

    @property
    def weight(self) -> Tensor:
        """Prototypes, (K, d)."""
        weight = self.last_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def features(self, x: Tensor) -> Tensor:
        """Places on the unit sphere: (..., D) -> (..., d), in float32 at least."""
        return F.normalize(wide(self.mlp(x)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all prototypes: (..., D) -> (..., K)."""
        return self.features(x) @ wide(self.weight).T
