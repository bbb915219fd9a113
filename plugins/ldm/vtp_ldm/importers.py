"""Published weights of KL autoencoders to ours and back, exactly.

CompVis/latent-diffusion and hustvl/LightningDiT (VA-VAE) store one layout, diffusers' ``AutoencoderKL`` another, and
files of diffusers before its attention was renamed a third.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtp_core.models.bottlenecks import Chain
from vtp_ldm import layouts
from vtp_ldm.cnn import CNNDecoder, CNNEncoder
from vtp_ldm.gaussian import Gaussian
from vtp_ldm.layouts import Layout
from vtp_ldm.scaling import moments_of, settings_of
from vtp_plugins.importing import Converted, check_tensors
from vtp_plugins.spec import Spec

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """The checkpoints of one code base.

    Attributes:
        layout: names and shapes.
        elsewhere: prefixes of tensors that belong to others: the loss, a projection, a teacher.
    """

    layout: Layout
    elsewhere: tuple[str, ...] = ("\n",)
    holders: ClassVar[tuple[str, ...]] = ("first_stage_model",)
    """Where a latent diffusion model keeps its autoencoder, beside the denoiser and what embeds conditions."""

    def convert(
        self,
        tensors: Mapping[str, Tensor],
        *,
        image_size: int | tuple[int, int] = 256,
        groups: int = 32,
        scaling_factor: float | None = None,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> Converted:
        """The tokenizer of an autoencoder.

        Args:
            tensors: the autoencoder's state dict, perhaps with :meth:`others`.
            image_size: side of the pictures it was trained on, which the weights don't tell; one number or (H, W).
            groups: of the norms, likewise.
            scaling_factor: latents are seen as (z - shift_factor) * scaling_factor, which becomes the statistics.
            shift_factor: SD3's and FLUX's; 0 where a configuration has none.
            latents_mean: by channel, in place of a shift: (z - mean) * scaling_factor / std.
            latents_std: likewise.

        Raises:
            Mismatch: a tensor is unknown, missing or of another shape.
            ValueError: a factor that nothing can be divided by, or moments of another latent.
        """
        sections, found = self.to_ours(tensors, image_size=image_size, groups=groups)
        moments = moments_of(
            sections["bottleneck"]["channels"], scaling_factor, shift_factor, latents_mean, latents_std
        )
        return Converted(sections, {"tokenizer": found}, moments, left=tuple(self.others(tensors)))

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Options out of diffusers' ``config.json`` of an ``AutoencoderKL``; none of another's."""
        return settings_of(config)

    def to_ours(
        self, tensors: Mapping[str, Tensor], *, image_size: int | Sequence[int] = 256, groups: int = 32
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """Sections ``encoder``, ``bottleneck`` and ``decoder`` of a stack, and the tensors of a tokenizer.

        Args:
            tensors: the autoencoder's state dict; what :meth:`others` gives is left out.
            image_size: side of the pictures it was trained on, which the weights don't tell.
            groups: of the norms, likewise.

        Raises:
            ValueError: a tensor is unknown, missing or of another shape.
        """
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(self.elsewhere)}
        sections = _Reading(self.layout, own, image_size, groups).sections()
        shapes = shapes_of(sections)
        levels = len(sections["encoder"]["multipliers"])
        names = {ours: self.layout.name(ours, levels) for ours in shapes}
        check_tensors(
            {name: tuple(tensor.shape) for name, tensor in own.items()},
            {name: self.layout.shape(ours, shapes[ours]) for ours, name in names.items()},
        )
        return sections, {ours: own[name].reshape(shapes[ours]).clone() for ours, name in names.items()}

    def to_theirs(self, tensors: Mapping[str, Tensor], sections: Sections) -> dict[str, Tensor]:
        """The inverse: their state dict of our tensors.

        Args:
            tensors: of a tokenizer (``encoder...``, ``bottleneck.links.0...``, ``decoder...``).
            sections: of its stack, all those that :meth:`to_ours` gives.

        Raises:
            ValueError: a tensor is unknown or missing.
        """
        shapes = shapes_of(sections)
        _refuse(tensors.keys() - shapes.keys(), "unknown")
        _refuse(shapes.keys() - tensors.keys(), "missing")
        levels = len(sections["encoder"]["multipliers"])
        return {
            self.layout.name(ours, levels): self.layout.theirs(ours, tensor).clone()
            for ours, tensor in tensors.items()
        }

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not the autoencoder's: of its loss, of an alignment."""
        return {name: tensor for name, tensor in tensors.items() if name.startswith(self.elsewhere)}


class _Reading:
    """Sections of a stack off the shapes of a checkpoint.

    Args:
        layout: of the code base.
        tensors: the autoencoder's state dict.
        size: ``image_size``.
        groups: of the norms.
    """

    def __init__(
        self, layout: Layout, tensors: Mapping[str, Tensor], size: int | Sequence[int], groups: int
    ) -> None:
        self.layout, self.tensors, self.size, self.groups = layout, tensors, size, groups
        self.side = size if isinstance(size, int) else min(size)
        self.levels = 0  # an encoder's names don't depend on it
        self.levels = self.count("encoder.down.{}.block.0.conv1.weight")

    def sections(self) -> dict[str, dict[str, Any]]:
        """``encoder``, ``bottleneck`` and ``decoder``."""
        shape = self._shape()
        wide, project = (
            self.shape("encoder.conv_out.weight")[0],
            self.has("bottleneck.links.0.quant_conv.weight"),
        )
        moments = self.shape("bottleneck.links.0.quant_conv.weight")[0] if project else wide
        encoder = {
            "use": "ldm_cnn", **shape, "attention": self._attention("encoder.down"), "image_size": self.size,
            "z_channels": wide // 2, "double_z": True, "groups": self.groups,
        }  # fmt: skip
        decoder = {
            "use": "ldm_cnn", **shape, "attention": self._attention("decoder.up"),
            "z_channels": self.shape("decoder.conv_in.weight")[1],
            "project": self.has("decoder.post_quant_conv.weight"), "groups": self.groups,
        }  # fmt: skip
        bottleneck = {"use": "kl", "channels": moments // 2, "project": project}
        return {"encoder": encoder, "bottleneck": bottleneck, "decoder": decoder}

    def _shape(self) -> dict[str, Any]:
        channels = self.shape("encoder.conv_in.weight")[0]
        widths = [self.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(self.levels)]
        if not widths or any(width % channels for width in widths):
            raise ValueError(f"widths {widths} are no multiples of {channels}: no autoencoder of this layout")
        return {
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "blocks": self.count("encoder.down.0.block.{}.conv1.weight"),
        }

    def _attention(self, prefix: str) -> list[int]:
        """Sides of the map at which there is attention."""
        return [
            self.side // 2**level
            for level in range(self.levels)
            if self.has(f"{prefix}.{level}.attn.0.q.weight")
        ]

    def _name(self, ours: str) -> str:
        return self.layout.name(ours, self.levels)

    def has(self, ours: str) -> bool:
        """Whether the checkpoint holds a tensor, by our name."""
        return self._name(ours) in self.tensors

    def shape(self, ours: str) -> tuple[int, ...]:
        """Shape of a tensor, by our name."""
        name = self._name(ours)
        if name not in self.tensors:
            raise ValueError(f"tensors missing: {name}; is this an autoencoder of this layout?")
        return tuple(self.tensors[name].shape)

    def count(self, ours: str) -> int:
        """How many tensors there are of a name with a number."""
        return next(index for index in itertools.count() if not self.has(ours.format(index)))


def shapes_of(sections: Sections) -> dict[str, tuple[int, ...]]:
    """Shapes of a tokenizer's tensors, by our name."""
    return {name: tuple(tensor.shape) for name, tensor in _built(sections).state_dict().items()}


def _built(sections: Sections) -> nn.ModuleDict:
    """The tokenizer, without memory."""
    options = {name: {k: v for k, v in node.items() if k != "use"} for name, node in sections.items()}
    with torch.device("meta"):
        encoder = CNNEncoder(Spec(size=(0, 0)), **options["encoder"])
        spec = Spec(size=encoder.size, patch=encoder.patch, width=encoder.width)
        bottleneck = Gaussian(spec, **options["bottleneck"])
        spec = replace(spec, channels=bottleneck.channels)
        decoder = CNNDecoder(spec, **options["decoder"])
    return nn.ModuleDict({"encoder": encoder, "bottleneck": Chain([bottleneck]), "decoder": decoder})


def _refuse(found: Iterable[str], what: str) -> None:
    if told := ", ".join(sorted(found)):
        raise ValueError(f"tensors {what}: {told}")


LDM = Family(layouts.COMPVIS, ("loss.", "linear_proj.", "foundation_model."))
DIFFUSERS = Family(layouts.DIFFUSERS)
DIFFUSERS_OLD = Family(layouts.DIFFUSERS_OLD)
