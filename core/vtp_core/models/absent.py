"""A stand-in for a tokenizer: latents of a known shape that nothing here encodes or decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vtp_core.errors import DataFault
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec

Count = Annotated[int, Field(gt=0)]


class Absent(nn.Module):
    """What ``vtp convert`` puts where a generator came without a tokenizer; its latents are sampled all the same.

    Args:
        spec: not read.
        channels: C of the latent.
        grid: its cells along each axis.
    """

    def __init__(self, spec: Spec, *, channels: Count, grid: tuple[Count, ...]) -> None:
        super().__init__()
        self.width, self.depth = channels, 0
        self.size, self.patch = tuple(grid), (1,) * len(grid)
        self.place = nn.Parameter(torch.empty(0))  # tells the device

    def forward(
        self,
        x: Tensor,
        *,
        want: Mapping[str, int] | None = None,
        mask: Tensor | None = None,
        select: Mapping[str, Tensor] | None = None,
        drop: float | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Tensor]:
        """Refuse.

        Raises:
            DataFault: always.
        """
        raise DataFault(
            "this generator has no tokenizer; convert it again with one: vtp convert ... --tokenizer RUN"
        )
