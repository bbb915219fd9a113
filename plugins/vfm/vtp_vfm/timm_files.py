"""Files with timm's own keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core.teachers.frozen import SIGNED
from vtp_vfm.backbone import backbone
from vtp_vfm.layout import Layout
from vtp_vfm.sizes import Tensors

_POOL = "attn_pool."  # a pooling head, which the encoder is built without


class TimmFile(Layout):
    """A network of timm by its name.

    Args:
        name: timm's, with or without the tag of its weights.
        arguments: of timm's constructor, for sizes without a name.
        prefix: before the names in the file.
        mean: of the channels of pictures, where another library says so; empty where timm's name tells.
    """

    def __init__(
        self, name: str, arguments: Mapping[str, Any], prefix: str = "", mean: tuple[float, ...] = ()
    ) -> None:
        self.name, self.arguments, self.prefix, self.mean = name, dict(arguments), prefix, mean
        with torch.device("meta"):
            self.network = backbone(name, self.arguments, None)

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return bool(self.own(tensors))

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The network's tensors without their prefix, its classifier and its pooling head."""
        heads = self.network.pretrained_cfg.get("classifier") or ()
        others = (_POOL, *(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads)))
        found = {k.removeprefix(self.prefix): t for k, t in tensors.items() if k.startswith(self.prefix)}
        return {name: tensor for name, tensor in found.items() if not name.startswith(others)}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section."""
        found: dict[str, Any] = {"name": self.name}
        if self.arguments:
            found["arguments"] = self.arguments
        if self.mean:
            found["normalise"] = "signed" if self.mean == SIGNED[0] else "own"
        side = self.arguments.get("img_size", self.network.pretrained_cfg["input_size"][-1])
        return {**found, "image_size": image_size or side}

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """The same tensors."""
        return dict(own)

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same tensors."""
        return dict(ours)
