"""Bare towers to a directory with an encoder alone: timm's files, their authors', transformers' and open_clip's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_plugins.importing import Converted, Mismatch, check_tensors
from vtp_plugins.spec import Spec
from vtp_vfm import layouts
from vtp_vfm.clip import CLIP, PREFIX, TRUNK, configured
from vtp_vfm.dinov2 import DINOv2
from vtp_vfm.dinov3 import DINOv3
from vtp_vfm.dinov3_transformers import DINOv3Transformers
from vtp_vfm.encoder import Timm
from vtp_vfm.layout import Layout
from vtp_vfm.sizes import Tensors
from vtp_vfm.timm_files import TimmFile
from vtp_vfm.transformers import Transformers

Sections = Mapping[str, Mapping[str, Any]]
_NETWORK = "encoder.network."


class Towers:
    """An importer of one family, in whichever of its layouts a file is.

    Args:
        family: its name.
        layouts: those that are known; the first is what :meth:`to_theirs` gives.
        kinds: ``model_type`` of transformers' configurations of this family.
    """

    holders = ("teacher", "backbone")  # of training checkpoints

    def __init__(self, family: str, *layouts: Layout, kinds: tuple[str, ...]) -> None:
        self.family, self.layouts, self.kinds = family, layouts, kinds

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options out of transformers' ``config.json`` of such a tower, perhaps of two; none of another's."""
        vision = config.get("vision_config", config)
        if config.get("model_type") not in self.kinds or not isinstance(vision, Mapping):
            return {}
        return {"heads": vision["num_attention_heads"]} if "num_attention_heads" in vision else {}

    def convert(
        self, tensors: Mapping[str, Tensor], *, heads: int | None = None, image_size: int | None = None
    ) -> Converted:
        """A tokenizer that is an encoder alone.

        Args:
            tensors: of the tower, perhaps among others.
            heads: of a tower whose heads have not 64 channels.
            image_size: side of the pictures; None is what its table of positions was made for, or timm's.

        Raises:
            Mismatch: a tensor is unknown, missing or of another shape.
            ValueError: heads are to be said, or this is another family's file.
        """
        return converted(self._layout(tensors), tensors, heads, image_size)

    def to_ours(
        self, tensors: Mapping[str, Tensor], *, heads: int | None = None, image_size: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Section ``encoder`` of a stack, and the tensors of a tokenizer; as :meth:`convert`."""
        found = self.convert(tensors, heads=heads, image_size=image_size)
        return dict(found.sections), dict(found.parts["tokenizer"])

    def to_theirs(
        self, tensors: Mapping[str, Tensor], sections: Sections, layout: int = 0
    ) -> dict[str, Tensor]:
        """The inverse: a bare tower in one of the family's layouts."""
        return theirs(self.layouts[layout], tensors, sections)

    def _layout(self, tensors: Tensors) -> Layout:
        for layout in self.layouts:
            if layout.fits(tensors):
                return layout
        raise ValueError(
            f"these are not the tensors of {self.family}; vtp list importers shows other formats"
        )


class TimmTowers:
    """The importer ``timm``: files with timm's keys, of any of its networks."""

    holders = ()

    def convert(
        self,
        tensors: Mapping[str, Tensor],
        *,
        name: str,
        image_size: int | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> Converted:
        """A tokenizer that is an encoder alone.

        Args:
            tensors: of the network, perhaps with its classifier.
            name: timm's, with or without the tag of the weights, which tells mean and deviation.
            image_size: side of the pictures; None is timm's.
            arguments: of timm's constructor, for sizes without a name.

        Raises:
            Mismatch: a tensor is unknown, missing or of another shape.
            ValueError: timm knows no such network.
        """
        return converted(TimmFile(name, arguments or {}), tensors, None, image_size)

    def to_theirs(self, tensors: Mapping[str, Tensor], sections: Sections) -> dict[str, Tensor]:
        """The inverse: a state dict of timm's, without its classifier."""
        node = sections["encoder"]
        return theirs(TimmFile(node["name"], node.get("arguments", {})), tensors, sections)


class OpenCLIPTowers:
    """The importer ``open_clip``: the image tower of a file with both."""

    holders = ()

    def convert(
        self, tensors: Mapping[str, Tensor], *, name: str, image_size: int | None = None
    ) -> Converted:
        """A tokenizer that is an encoder alone.

        Args:
            tensors: of both towers, or of the one under ``visual.``.
            name: open_clip's, and behind a dot that of the weights: ``ViT-L-14.laion2b_s32b_b82k``.
            image_size: side of the pictures; None is what its table of positions was made for.

        Raises:
            Mismatch: a tensor is unknown, missing or of another shape.
            ValueError: open_clip knows no such model, or one that timm's network can't be.
        """
        return converted(self._layout(name), tensors, None, image_size)

    def to_theirs(self, tensors: Mapping[str, Tensor], sections: Sections, name: str) -> dict[str, Tensor]:
        """The inverse, under ``visual.``, without the projection."""
        layout = self._layout(name)
        prefix = TRUNK if isinstance(layout, TimmFile) else PREFIX
        return {f"{prefix}{key}": tensor for key, tensor in theirs(layout, tensors, sections).items()}

    def _layout(self, name: str) -> Layout:
        model, told = configured(name)
        trunk = model["vision_cfg"].get("timm_model_name")
        if trunk:
            return TimmFile(trunk, {}, TRUNK, tuple(told.get("mean", ())))
        return CLIP(model, told)


def converted(
    layout: Layout, tensors: Mapping[str, Tensor], heads: int | None, image_size: int | None
) -> Converted:
    """A tower through its layout, every tensor held against timm's network."""
    own = layout.own(tensors)
    if not own:
        raise ValueError("no tensor of such a tower is in the file")
    told = layout.node(own, heads or layout.heads(tensors), image_size)
    node = {"use": "timm", "weights": "checkpoint", **told, "frozen": True}
    wanted = layout.backward(network_of(node), node)
    check_tensors(*({name: tuple(t.shape) for name, t in side.items()} for side in (own, wanted)))
    layout.check({name: tensor for name, tensor in tensors.items() if not tensor.is_meta}, node)
    found = {f"{_NETWORK}{name}": tensor.clone() for name, tensor in layout.forward(own).items()}
    used = {id(tensor) for tensor in own.values()}
    left = tuple(name for name, tensor in tensors.items() if id(tensor) not in used)
    return Converted({"encoder": node}, {"tokenizer": found}, left=left)


def theirs(layout: Layout, tensors: Mapping[str, Tensor], sections: Sections) -> dict[str, Tensor]:
    """A tokenizer's encoder in another layout.

    Raises:
        Mismatch: tensors are unknown, missing or of another shape.
    """
    node = sections["encoder"]
    ours = {k.removeprefix(_NETWORK): t for k, t in tensors.items() if k.startswith(_NETWORK)}
    try:
        check_tensors(
            *({name: tuple(t.shape) for name, t in side.items()} for side in (ours, network_of(node)))
        )
    except Mismatch as error:
        raise Mismatch(f"the tensors are not those of encoder timm {node['name']!r}\n{error}") from error
    return {name: tensor.clone() for name, tensor in layout.backward(ours, node).items()}


def network_of(node: Mapping[str, Any]) -> dict[str, Tensor]:
    """State of the encoder's network, without memory."""
    options = {key: value for key, value in node.items() if key not in {"use", "frozen"}}
    with torch.device("meta"):
        found: dict[str, Tensor] = Timm(Spec(size=(0, 0)), **options).network.state_dict()
    return found


TIMM = TimmTowers()
DINOV2 = Towers("DINOv2", DINOv2(), Transformers(layouts.DINOV2), kinds=("dinov2", "dinov2_with_registers"))
DINOV3 = Towers("DINOv3", DINOv3(), DINOv3Transformers(), kinds=("dinov3_vit",))
MAE = Towers("MAE", Transformers(layouts.MAE), kinds=("vit_mae",))
SIGLIP = Towers("SigLIP", Transformers(layouts.SIGLIP), kinds=("siglip", "siglip_vision_model", "siglip2"))
OPEN_CLIP = OpenCLIPTowers()
