"""DINO: crops agree on prototypes that an EMA teacher assigns (arXiv 2104.14294, as in 2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vtp_core.data import views
from vtp_core.nn.centering import Centering
from vtp_core.nn.chunked import cross_entropy_terms
from vtp_core.nn.prototypes import PrototypeHead
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class DINO(Objective):
    """Cross-entropy of every student crop against every teacher crop but its own.

    Args:
        spec: shapes of the tokenizer.
        on: the image-level output, ``cls`` or ``latent.cls``.
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
        local_crops: n, small crops per picture, read by the student only.
        local_size: their side in pixels; None is about three sevenths of the stack's.
        local_scale: their share of the picture's area.
        global_scale: the same of the two global crops.
    """

    head: Any  # a PrototypeHead, or what has its features, weight and prototypes
    shadow = ("head",)
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"prototypes": 1024, "hidden": 256, "bottleneck": 64, "local_crops": 4},
    }

    def __init__(
        self,
        spec: Spec,
        *,
        on: Literal["cls", "latent.cls"] = "cls",
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
        local_crops: int = 8,
        local_size: int | None = None,
        local_scale: tuple[float, float] = (0.05, 0.32),
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
        self.on, self.temperature = on, student_temperature
        self.views = {"global": views.global_crops(spec, scale=global_scale)}
        self.needs = {
            "student": Need("global", {on}),
            "teacher": Need("global", {on}, source="ema", mask=None),
        }
        if local_crops:
            self.views["local"] = views.local_crops(spec, local_crops, size=local_size, scale=local_scale)
            self.needs["local"] = Need("local", {on})

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: G global and n local crops, R rows, D width, d of the unit sphere."""
        crops = [got["student"][self.on]]
        crops += [got["local"][self.on]] if "local" in got else []
        places = self.head.features(torch.cat(crops)) / self.temperature  # (G + n, R, D) -> (G + n, R, d)
        student = places.flatten(0, 1)  # ((G + n) R, d)
        with torch.no_grad():
            head: Any = self.ema("head")
            teacher = head.features(got["teacher"][self.on]).flatten(0, 1)  # (G, R, D) -> (G R, d)
            targets = self.centering(teacher, head.weight, clock, self.pending)
        normaliser, mean = cross_entropy_terms(student, self.head.weight, targets)
        normaliser = normaliser.unflatten(0, places.shape[:2])  # (G + n, R)
        mean = mean.unflatten(0, (-1, places.shape[1]))  # (G R, d) -> (G, R, d)
        count, everyone = len(mean), mean.sum(0)  # (R, d)
        # The sum over teachers of normaliser - x . mean, for each crop; a global crop leaves out its own.
        globe = (count - 1) * normaliser[:count] - (places[:count] * (everyone - mean)).sum(-1)  # (G, R)
        local = count * normaliser[count:] - (places[count:] * everyone).sum(-1)  # (n, R)
        pairs = count * (count - 1 + len(local))
        terms = {"global": globe.mean(1).sum() / pairs}
        return {**terms, "local": local.mean(1).sum() / pairs} if len(local) else terms

    def settle(self, clock: Clock) -> None:
        """Merge this step's teacher scores into the centre."""
        self.centering.settle(self.pending, clock)
        super().settle(clock)
