"""How one code base stores a tower, against timm's network of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtp_vfm.sizes import Tensors


class Layout:
    """Names, shapes and constants of one code base's files."""

    def fits(self, tensors: Tensors) -> bool:
        """Whether a state dict is in this layout."""
        raise NotImplementedError

    def own(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tower's tensors out of a state dict, without what stands before their names."""
        raise NotImplementedError

    def heads(self, tensors: Tensors) -> int | None:
        """How many heads the tensors tell; None where they don't."""
        return None

    def node(self, own: Tensors, heads: int | None, image_size: int | None) -> dict[str, Any]:
        """Options of the encoder ``timm`` that the tensors tell.

        Raises:
            ValueError: they tell too little.
        """
        raise NotImplementedError

    def check(self, tensors: Tensors, node: Mapping[str, Any]) -> None:
        """Refuse a file whose constants are not those of timm's network, which would compute something else.

        Raises:
            ValueError: they are others.
        """

    def forward(self, own: Tensors) -> dict[str, Tensor]:
        """Their tensors by the names of timm's network."""
        raise NotImplementedError

    def backward(self, ours: Tensors, node: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse; on the meta device it tells what a state dict must hold."""
        raise NotImplementedError
