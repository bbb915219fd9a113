"""Published weights of DiT, SiT, REPA, LightningDiT, RAE and DDT to ours and back, exactly.

Code bases: facebookresearch/DiT, willisma/SiT, sihyun-yu/REPA and End2End-Diffusion/REPA-E, hustvl/LightningDiT,
bytetriper/RAE, MCG-NJU/DDT. State dicts are those of the network alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtp_dit import layouts, published
from vtp_dit.layouts import Layout, Part
from vtp_dit.published import Setting
from vtp_dit.reading import Reading, shape_in
from vtp_plugins.importing import Converted, check_tensors
from vtp_plugins.spec import Spec

_CLOSE = 1e-5
_BN_EPS = 1e-4  # of REPA-E's latent statistics


@dataclass(frozen=True, slots=True)
class Family:
    """The checkpoints of one code base.

    Attributes:
        generator: name of the generator that takes the weights.
        layout: names and row orders.
        fixed: options that shapes don't tell.
        streams: streams of blocks.
        setting: path and sampler of the publication.
        elsewhere: prefixes of tensors that belong to others: projectors, latent statistics.
        holders: names or prefixes under which files keep the network.
    """

    generator: str
    layout: Layout
    fixed: Mapping[str, Any]
    streams: int = 1
    elsewhere: tuple[str, ...] = ()
    setting: Setting = field(default_factory=Setting)
    holders: tuple[str, ...] = ()

    def convert(
        self,
        tensors: Mapping[str, Tensor],
        *,
        heads: int | None = None,
        head_heads: int | None = None,
        encoder_blocks: int | None = None,
        patch: int | None = None,
        grid: tuple[int, ...] | None = None,
        flip: bool | None = None,
    ) -> Converted:
        """The generator with its path and the sampler of its publication.

        Args:
            tensors: the network's state dict, perhaps with :meth:`others`; latent statistics among them are kept.
            heads: of unpublished widths.
            head_heads: of the head of ``ddt`` and ``dit_dh``, likewise.
            encoder_blocks: of DDT in unpublished widths.
            patch: of DDT, where it isn't 2.
            grid: cells of the latent, where the weights hold no table of positions.
            flip: overrules the family's direction of time.

        Raises:
            ValueError: as :meth:`to_ours`.
        """
        given = {
            "heads": heads, "head_heads": head_heads, "encoder_blocks": encoder_blocks, "patch": patch,
            "flip": flip,
        }  # fmt: skip
        options, found = self.to_ours(tensors, **{k: v for k, v in given.items() if v is not None})
        cells = tuple(options.get("grid", grid or ()))  # DDT's positions tell no grid
        if options["positions"] != "learned":
            options.pop("grid", None)
        spec, others = self.spec_of(found, options), self.others(tensors)
        setting = published.RAE if options["time"] == "fourier" else self.setting
        return Converted(
            sections=setting.sections({"use": self.generator, **options}),
            parts={"generator": found},
            statistics=_statistics(others),
            latent=(spec.channels, *cells),
            classes=spec.classes,
            left=tuple(name for name in others if not name.startswith("bn.")),
        )

    def to_ours(
        self, tensors: Mapping[str, Tensor], **known: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Options and tensors of our generator.

        A position table that is not the sine-cosine one, as REPA-E trains it, becomes ``positions: learned``.

        Args:
            tensors: the network's state dict; what :meth:`others` gives is left out.
            **known: options that the weights cannot tell, or tell wrongly: ``heads`` of unpublished widths,
                ``encoder_blocks`` and ``patch`` of DDT, ``flip``.

        Raises:
            ValueError: a tensor is unknown, missing, of another shape, or no table where a table belongs.
        """
        own = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(self.elsewhere or ("\n",))
        }
        options = Reading(self.layout, self.fixed, self.streams, own, known).options()
        channels, classes = self._sides(own, options)
        parts = layouts.parts(self.layout, options, channels, classes)
        constants = layouts.constants(self.layout, options)
        _check(own, parts, constants)
        found: dict[str, Tensor] = {}
        for part in parts:
            found |= part.to_ours(own[part.theirs])
        return options, found

    def to_theirs(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse: their state dict of our tensors, with the tables that theirs store.

        Args:
            tensors: our state dict.
            options: all those that :meth:`to_ours` gives.

        Raises:
            ValueError: a tensor is unknown or missing.
        """
        spec = self.spec_of(tensors, options)
        parts = layouts.parts(self.layout, options, spec.channels, spec.classes)
        names = {name for part in parts for name in part.ours}
        _refuse({name: tensors[name].shape for name in tensors.keys() - names}, "unknown")
        _refuse(dict.fromkeys(names - tensors.keys(), ()), "missing")
        dtype = tensors["body.embed.proj.weight"].dtype
        constants = layouts.constants(self.layout, options)
        return {name: table.to(dtype) for name, table in constants.items()} | {
            part.theirs: part.to_theirs(tensors) for part in parts
        }

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are not the generator's: projectors of an alignment, latent statistics."""
        return {
            name: tensor for name, tensor in tensors.items() if name.startswith(self.elsewhere or ("\n",))
        }

    def spec_of(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Spec:
        """The least spec to build the generator from: channels, classes and latent grid of our tensors."""
        width = tensors["body.embed.proj.weight"].shape[1]
        return Spec(
            size=tuple(options.get("grid", (16, 16))),
            patch=(1, 1),
            channels=width // options["patch"] ** 2,
            classes=len(tensors["condition.table.weight"]) - 1,
            condition="label",
        )

    def _sides(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of the latent and number of classes."""
        embed = shape_in(tensors, "x_embedder.proj.weight")
        channels = embed[1] if len(embed) == 4 else embed[1] // options["patch"] ** 2
        return channels, shape_in(tensors, "y_embedder.embedding_table.weight")[0] - 1


def _statistics(others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean and std of the latent off the batch norm that REPA-E trains with; empty without one."""
    if "bn.running_mean" not in others:
        return {}
    std = (others["bn.running_var"].double() + _BN_EPS).sqrt().float()
    return {"mean": others["bn.running_mean"].float(), "std": std}


def _check(tensors: Mapping[str, Tensor], parts: list[Part], constants: Mapping[str, Tensor]) -> None:
    """Names, shapes and constants are what they should be."""
    shapes = {part.theirs: part.shape for part in parts} | {k: tuple(v.shape) for k, v in constants.items()}
    check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    for name, table in constants.items():
        limit = max(_CLOSE, float(torch.finfo(tensors[name].dtype).eps))
        if not torch.allclose(tensors[name].float(), table, rtol=0, atol=limit):
            raise ValueError(f"{name}: not the table that its shape and the options imply")


def _refuse(found: Mapping[str, tuple[int, ...]], what: str) -> None:
    if found:
        told = ", ".join(f"{name} {tuple(shape)}" if shape else name for name, shape in sorted(found.items()))
        raise ValueError(f"tensors {what}: {told}")


_FORWARD = {"flip": False}
_TURNED = {"flip": True, "max_period": 10.0}
_HOLDERS = ("ema_denoiser", "denoiser")
DIT = Family("dit", layouts.DIT, {"timesteps": 1000, **_FORWARD}, setting=published.DIT)
SIT = Family("sit", layouts.DIT, {"flip": True}, setting=published.SIT)
REPA = Family("sit", layouts.DIT, _FORWARD, elsewhere=("projectors.", "bn."), setting=published.REPA)
LIGHTNINGDIT = Family("lightningdit", layouts.DIT, {"flip": True}, setting=published.LIGHTNINGDIT)
DDT = Family("ddt", layouts.DDT, _TURNED, 2, ("proj.",), published.DDT, _HOLDERS)
DDT_FLAT = Family("lightningdit", layouts.DDT, _TURNED, 1, ("proj.",), published.DDT, _HOLDERS)
DIT_DH = Family("dit_dh", layouts.DIT_DH, _FORWARD, 2, setting=published.RAE)
