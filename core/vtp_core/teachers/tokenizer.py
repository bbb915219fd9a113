"""An earlier run's tokenizer as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vtp_core.teachers.frozen import Frozen, Interpolation, is_meta
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.spec import Spec


class Run(Frozen):
    """``cls``, ``patches`` and ``hidden:k`` of the encoder of a run or an export.

    Args:
        spec: tells the tokenizer's patch.
        run: the run's directory.
        weights: ``student``, or ``ema`` where the run kept an EMA teacher.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        run: str,
        weights: Literal["student", "ema"] = "student",
        size: int | tuple[int, int] | None = None,
        interpolation: Interpolation = "bicubic",
        antialias: bool = False,
    ) -> None:
        meta = is_meta()
        with torch.device("cpu"):
            teacher = Tokenizer.from_pretrained(Path(run).expanduser(), weights)
        patch = teacher.spec.patch
        super().__init__(
            spec, width=teacher.spec.width, stride=(patch[0], patch[1]), size=size,
            interpolation=interpolation, antialias=antialias,
        )  # fmt: skip
        self.encoder, self.modality = teacher.encoder, teacher.modality
        if meta:
            self.encoder.to("meta")
        self.requires_grad_(False).eval()

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """What the encoder gives of pictures in [0, 1]."""
        found: Mapping[str, Tensor] = self.encoder(
            self.modality.normalise(x), want=dict.fromkeys(want, len(x))
        )
        return found
