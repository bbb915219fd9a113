"""What a file of RAE holds, and the sections of a stack that its shapes tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtp_vfm.decoder import SIZES
from vtp_vfm.layouts import DECODER, DECODER_TABLE, TOWERS, Tower
from vtp_vfm.sizes import arguments_of, depth_of, shape_of, side_of

_HEADS = {shape["width"]: shape["heads"] for name, shape in SIZES.items() if name in {"b", "l", "xl"}}


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of an encoder and of RAE's decoder.

    Attributes:
        tower: names of the encoder.
        prefix: before them.
        decoder_prefix: before the decoder's.
        encoder: the encoder's tensors, without the prefix.
        decoder: likewise.
        others: tensors of neither, by their whole names.
    """

    tower: Tower
    prefix: str
    decoder_prefix: str
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def own(self) -> dict[str, Tensor]:
        """Encoder and decoder by the names of the file."""
        return {self.prefix + name: tensor for name, tensor in self.encoder.items()} | {
            self.decoder_prefix + name: tensor for name, tensor in self.decoder.items()
        }

    @property
    def registers(self) -> int:
        """Register tokens of the encoder."""
        tokens = self.encoder.get(self.tower.registers or "\n")
        return 0 if tokens is None else tokens.shape[-2]


def found_in(tensors: Mapping[str, Tensor]) -> Found:
    """Sort a state dict.

    Raises:
        ValueError: it lacks an encoder or a decoder that is known here.
    """
    before = next((p for p in ("", "decoder.") if f"{p}{DECODER_TABLE}" in tensors), None)
    if before is None:
        raise ValueError(f"{DECODER_TABLE} is missing: no decoder of RAE is here")
    mine = tuple(before + name for name in DECODER)
    decoder = {name: tensor for name, tensor in tensors.items() if name.startswith(mine)}
    place = tower_in(tensors.keys() - decoder.keys(), TOWERS)
    if place is None:
        raise ValueError(
            "encoder: none is among the tensors; RAE's decoder reads what DINOv2, SigLIP 2 or MAE gives, whose file "
            "in the layout of transformers comes along with --with FILE"
        )
    tower, prefix = place
    encoder = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in decoder
        and name.startswith(prefix)
        and not name.removeprefix(prefix).startswith(tower.elsewhere)
    }
    others = {name: tensor for name, tensor in tensors.items() if name not in encoder and name not in decoder}
    bare = {name.removeprefix(prefix): tensor for name, tensor in encoder.items()}
    return Found(
        tower, prefix, before, bare, {name.removeprefix(before): t for name, t in decoder.items()}, others
    )


def tower_in(names: Iterable[str], towers: Sequence[Tower]) -> tuple[Tower, str] | None:
    """The layout that the names have, and their prefix; None where it is none of these."""
    for tower in towers:
        signs = sorted((name for name in names if name.endswith(tower.sign)), key=_foreign)
        if signs:
            return tower, signs[0].removesuffix(tower.sign)
    return None


def _foreign(name: str) -> tuple[bool, int]:
    """Text towers have the same names as image towers."""
    return "text_model" in name, len(name)


def options_of(
    found: Found, image_size: int | None, heads: int | None, decoder_heads: int | None, tau: float
) -> dict[str, Any]:
    """Sections ``encoder``, ``bottleneck`` and ``decoder``."""
    decoder = _decoder(found, decoder_heads)
    side = image_size or decoder["grid"][0] * decoder["patch"]
    if side % decoder["grid"][0]:
        raise ValueError(
            f"image_size: {side} is not a multiple of the latent's {decoder['grid'][0]} tokens a side"
        )
    encoder = {**encoder_of(found, heads), "patch": side // decoder["grid"][0], "image_size": side}
    noise = {"use": "noise", "law": "uniform", "tau": tau}
    return {"encoder": encoder, "bottleneck": [noise], "decoder": decoder}


def encoder_of(found: Found, heads: int | None) -> dict[str, Any]:
    """Section ``encoder`` that an encoder's shapes tell, without its final norm's weights."""
    tower = found.tower
    kernel = shape_of(found.encoder, f"{tower.outer['patch_embed.proj']}.weight")
    hidden = shape_of(found.encoder, f"{tower.layer}0.{tower.inner['mlp.fc1']}.weight")[0]
    tokens = shape_of(found.encoder, tower.positions)[-2] - (0 if tower.flat else 1)
    arguments = {
        "img_size": side_of(tokens, tower.positions) * kernel[-1],
        **arguments_of(kernel, depth_of(found.encoder, tower.layer), hidden, heads),
    }
    if found.registers:
        # timm's own file has the class token's place added to it, which can't be undone
        arguments |= {"reg_tokens": found.registers, "no_embed_class": False}
    node = {
        "use": "timm",
        "name": tower.model(kernel[0], found.registers > 0),
        "weights": "checkpoint",
        "affine": False,
    }
    if tower.eps is not None:
        node["eps"] = tower.eps
    return {**node, "arguments": arguments, "frozen": True}


def _decoder(found: Found, heads: int | None) -> dict[str, Any]:
    width = shape_of(found.decoder, "decoder_embed.weight")[0]
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(
            f"decoder_heads: width {width} is not published and the weights don't tell; say how many"
        )
    values = shape_of(found.decoder, "decoder_pred.weight")[0]
    grid = side_of(shape_of(found.decoder, DECODER_TABLE)[1] - 1, DECODER_TABLE)
    return {
        "use": "rae", "width": width, "depth": depth_of(found.decoder, "decoder_layers."), "heads": heads,
        "hidden": shape_of(found.decoder, "decoder_layers.0.intermediate.dense.weight")[0],
        "patch": side_of(values // 3, "decoder_pred.weight"), "grid": [grid, grid],
        "range": "signed" if found.tower.signed else "normalised",
    }  # fmt: skip
