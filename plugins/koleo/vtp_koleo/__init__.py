"""KoLeo: spread features by pushing each from its nearest neighbour (arXiv 1806.03198; as in DINOv2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vtp_core.data.views import global_crops
from vtp_core.nn.chunked import wide
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class KoLeo(Objective):
    """The Kozachenko-Leonenko entropy of each crop's features over the whole batch, summed over crops.

    Args:
        spec: shapes of the tokenizer.
        on: the image-level output, ``cls`` or ``latent.cls``.
        view: whose features are spread.
        global_scale: the global crops' share of the picture's area.
        eps: added to differences and distances.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        on: Literal["cls", "latent.cls"] = "cls",
        view: str = "global",
        global_scale: tuple[float, float] = (0.32, 1.0),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.coupled = True
        self.on, self.eps = on, eps
        self.needs = {"student": Need(view, {on})}
        if view == "global":
            self.views = {"global": global_crops(spec, scale=global_scale)}

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, W processes, D width."""
        x = F.normalize(wide(got["student"][self.on]), dim=-1, eps=self.eps)  # (K, R, D)
        everyone = clock.gather(x.transpose(0, 1)).transpose(0, 1)  # (K, R, D) -> (K, W R, D)
        if everyone.shape[1] < 2:
            raise ValueError(
                "koleo compares rows with each other and got one; raise its 'rows' or batch_size"
            )
        with torch.no_grad():
            near = x @ everyone.transpose(1, 2)  # (K, R, W R)
            near.diagonal(clock.rank * x.shape[1], 1, 2).fill_(-1)  # nobody is their own neighbour
            neighbour = near.argmax(2)  # (K, R)
        other = everyone.gather(1, neighbour[..., None].expand_as(x))  # (K, W R, D) -> (K, R, D)
        distance = torch.linalg.vector_norm(x - other + self.eps, dim=-1)  # (K, R)
        return {"spread": -(distance + self.eps).log().mean(1).sum()}
