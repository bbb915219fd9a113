"""iBOT: predict the prototypes that an EMA teacher sees behind masked patches (arXiv 2111.07832)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vtp_core.data import views
from vtp_core.data.masks import Block
from vtp_core.nn.centering import Centering
from vtp_core.nn.chunked import cross_entropy_terms
from vtp_core.nn.prototypes import PrototypeHead
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class IBot(Objective):
    """Cross-entropy between student and teacher prototypes at the masked patches of the global crops.

    Args:
        spec: shapes of the tokenizer.
        on: the patch-level output, ``patches`` or ``latent``.
        head: a shared prototype head, named under the stack's ``modules``; None builds one.
        prototypes: K, of an own head.
        hidden: width of an own head's MLP.
        bottleneck: width of an own head's unit sphere.
        layers: linear layers of an own head.
        centering: how teacher scores become targets.
        centre_momentum: of the softmax's centre.
        teacher_temperature: at the start and after the warm-up.
        temperature_warmup: share of the run over which it moves.
        student_temperature: constant.
        mask_probability: share of the crops that are masked.
        mask_ratio: share of a masked crop's patches, low and high.
        global_scale: the global crops' share of the picture's area.
    """

    head: Any  # a PrototypeHead, or what has its features, weight and prototypes
    shadow = ("head",)
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"prototypes": 1024, "hidden": 256, "bottleneck": 64},
    }

    def __init__(
        self,
        spec: Spec,
        *,
        on: Literal["patches", "latent"] = "patches",
        head: nn.Module | None = None,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        centering: Literal["sinkhorn", "softmax"] = "sinkhorn",
        centre_momentum: float = 0.9,
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        temperature_warmup: float = 0.3,
        student_temperature: float = 0.1,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        global_scale: tuple[float, float] = (0.32, 1.0),
    ) -> None:
        super().__init__()
        self.head = head or PrototypeHead(
            spec, on=on, prototypes=prototypes, hidden=hidden, bottleneck=bottleneck, layers=layers
        )
        self.centering = Centering(
            self.head.prototypes, centering, teacher_temperature, temperature_warmup, centre_momentum
        )
        self.coupled = centering == "sinkhorn"
        self.on, self.temperature = f"{on}@block", student_temperature
        self.views = {"global": views.global_crops(spec, scale=global_scale)}
        self.masks = {"block": Block(view="global", probability=mask_probability, ratio=mask_ratio)}
        self.needs = {
            "student": Need("global", {self.on}, mask="block"),
            "teacher": Need("global", {self.on}, source="ema", mask=None),
        }

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, N patches, M masked patches, D width, d of the unit sphere."""
        mask = got["student"].mask
        assert mask is not None, "a need that names a sampler comes with its mask"
        student = self.head.features(got["student"][self.on]) / self.temperature  # (M, D) -> (M, d)
        with torch.no_grad():
            head: Any = self.ema("head")
            teacher = head.features(got["teacher"][self.on])  # (M, D) -> (M, d)
            targets = self.centering(teacher, head.weight, clock, self.pending)
        normaliser, mean = cross_entropy_terms(student, self.head.weight, targets)
        loss = normaliser - (student * mean).sum(-1)  # (M,)
        share = (mask / mask.sum(-1, keepdim=True).clamp(min=1))[mask]  # (M,): every masked crop weighs one
        return {"patch": (loss * share).sum() / mask[..., 0].numel()}

    def settle(self, clock: Clock) -> None:
        """Merge this step's teacher scores into the centre."""
        self.centering.settle(self.pending, clock)
        super().settle(clock)
