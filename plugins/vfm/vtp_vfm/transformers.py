"""Bare towers as ``transformers`` stores them, to timm's network and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp_vfm.layout import Layout
from vtp_vfm.layouts import DINOV2, DINOV2_GATED, TABLE, Tower, joined, parted
from vtp_vfm.reading import Found, encoder_of, tower_in
from vtp_vfm.sizes import Tensors, depth_of
from vtp_vfm.tables import places_to_ours, places_to_theirs


class Transformers(Layout):
    """One of the layouts in :mod:`vtp_vfm.layouts`, with its final norm.

    Args:
        tower: the layout.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        return tower_in(tensors, (self.tower,)) is not None

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tower's tensors without what stands before their names; not masks, heads and text towers."""
        place = tower_in(tensors, (self.tower,))
        prefix = place[1] if place else ""
        bare = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        kept = f"{self.tower.norm}."
        return {k: t for k, t in bare.items() if k.startswith(kept) or not k.startswith(self.tower.elsewhere)}

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """The ``encoder`` section that the shapes tell."""
        found = encoder_of(self._found(own), heads) | {"affine": True}
        return {**found, "image_size": image_size or found["arguments"]["img_size"]}

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        found = self._found(own)
        names = found.tower.names(depth_of(own, found.tower.layer), found.registers, affine=True)
        return joined(names, places_to_ours(found))

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse."""
        tower = DINOV2_GATED if node["name"].startswith("vit_giant") else self.tower
        registers = int(node["arguments"].get("reg_tokens", 0))
        names = tower.names(depth_of(ours, "blocks."), registers, affine=True)
        assert TABLE in names
        return parted(names, places_to_theirs(ours, tower, registers))

    def _found(self, own: Tensors) -> Found:
        gated = f"{DINOV2.layer}0.mlp.weights_in.weight" in own
        return Found(DINOV2_GATED if gated else self.tower, "", "", dict(own), {}, {})
