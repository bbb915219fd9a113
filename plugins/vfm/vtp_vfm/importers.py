"""Weights of RAE (bytetriper/RAE) to ours and back, exactly: decoder, and encoder as ``transformers`` stores it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_plugins.importing import Converted, check_tensors
from vtp_plugins.spec import Spec
from vtp_vfm.decoder import RAEDecoder, positions
from vtp_vfm.encoder import Timm
from vtp_vfm.layouts import DECODER, DECODER_TABLE, TOWERS, decoder_names, joined, parted
from vtp_vfm.reading import Found, found_in, options_of
from vtp_vfm.tables import places_to_ours, places_to_theirs, theirs_shape

Sections = Mapping[str, Any]
_CLOSE = 1e-5
_ENCODER, _DECODER = "encoder.network.", "decoder."


class RAEWeights:
    """DINOv2 (with registers or without), SigLIP 2 or MAE under an affine-free norm, and RAE's decoder."""

    holders = ()

    def convert(
        self,
        tensors: Mapping[str, Tensor],
        *,
        image_size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
        tau: float = 0.8,
    ) -> Converted:
        """The tokenizer: frozen encoder, noise, decoder.

        Args:
            tensors: of RAE's decoder (``decoder_embed...``) and of the encoder's file in the layout of transformers,
                or of the whole model with both under ``decoder.`` and ``encoder.encoder.``.
            image_size: side of the pictures that are resized for the encoder; None is what the decoder gives.
            heads: of an encoder whose heads have not 64 channels.
            decoder_heads: of unpublished widths.
            tau: scale of the noise in training, which the weights don't tell.

        Raises:
            Mismatch: a tensor is unknown, missing or of another shape.
            ValueError: heads are to be said, or no known encoder or decoder is there.
        """
        sections, found = self.to_ours(
            tensors, image_size=image_size, heads=heads, decoder_heads=decoder_heads, tau=tau
        )
        return Converted(sections, {"tokenizer": found}, left=tuple(self.others(tensors)))

    def to_ours(
        self,
        tensors: Mapping[str, Tensor],
        *,
        image_size: int | None = None,
        heads: int | None = None,
        decoder_heads: int | None = None,
        tau: float = 0.8,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Sections ``encoder``, ``bottleneck`` and ``decoder`` of a stack, and the tensors of a tokenizer.

        Arguments and errors are those of :meth:`convert`.
        """
        found = found_in(tensors)
        sections = options_of(found, image_size, heads, decoder_heads, tau)
        encoder, decoder = _built(sections)
        shapes = _theirs_shapes(found, encoder, decoder)
        check_tensors({name: tuple(t.shape) for name, t in found.own.items()}, shapes)
        _check_table(found.decoder[DECODER_TABLE], decoder)
        ours = joined(found.tower.names(encoder.depth, found.registers), places_to_ours(found))
        return sections, {_ENCODER + name: tensor for name, tensor in ours.items()} | {
            _DECODER + name: tensor
            for name, tensor in joined(decoder_names(decoder.depth), found.decoder).items()
        }

    def to_theirs(self, tensors: Mapping[str, Tensor], sections: Sections) -> dict[str, Tensor]:
        """The inverse: names of the decoder's and of the bare encoder's file.

        Args:
            tensors: of a tokenizer, names as :meth:`to_ours` gives them.
            sections: of its stack, all those that :meth:`to_ours` gives.

        Raises:
            Mismatch: tensors are unknown, missing or of another shape.
        """
        encoder, decoder = _built(sections)
        own = {_ENCODER: encoder.network.state_dict(), _DECODER: decoder.state_dict()}
        shapes = {p + name: tuple(t.shape) for p, state in own.items() for name, t in state.items()}
        check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
        side = {
            prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for prefix in own
        }
        arguments = sections["encoder"]["arguments"]
        tower = next(t for t in TOWERS if sections["encoder"]["name"] in _models(t))
        registers = arguments.get("reg_tokens", 0)
        names = tower.names(encoder.depth, registers)
        table = _table(decoder).to(side[_DECODER]["token"].dtype)
        return (
            parted(names, places_to_theirs(side[_ENCODER], tower, registers))
            | parted(decoder_names(decoder.depth), side[_DECODER])
            | {DECODER_TABLE: table}
        )

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that belong to others: the final norm that RAE takes off, mask tokens, text towers."""
        return found_in(tensors).others


def _models(tower: Any) -> set[str]:
    return {tower.model(width, registers) for width in tower.models for registers in (False, True)}


def _built(sections: Sections) -> tuple[Any, Any]:
    """Encoder and decoder, without memory."""
    encoder_node, decoder_node = (
        {k: v for k, v in sections[name].items() if k not in {"use", "frozen"}}
        for name in ("encoder", "decoder")
    )
    with torch.device("meta"):
        encoder = Timm(Spec(size=(0, 0)), **encoder_node)
        spec = Spec(size=encoder.size, patch=encoder.patch, width=encoder.width, channels=encoder.width)
        return encoder, RAEDecoder(spec, **decoder_node)


def _theirs_shapes(found: Found, encoder: Any, decoder: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all their tensors, by the names of the file."""
    wanted: dict[str, tuple[int, ...]] = {}
    for prefix, names, state in (
        (found.prefix, found.tower.names(encoder.depth, found.registers), encoder.network.state_dict()),
        (found.decoder_prefix, decoder_names(int(decoder.depth)), decoder.state_dict()),  # type: ignore[arg-type]
    ):
        for ours, tensor in state.items():
            for name in names.get(ours, (ours,)):
                wanted[prefix + name] = theirs_shape(
                    ours, tuple(tensor.shape), len(names.get(ours, (ours,))), found
                )
    width = state["token"].shape[-1]
    tokens = math.prod(decoder.grid)  # type: ignore[arg-type]
    return wanted | {found.decoder_prefix + DECODER_TABLE: (1, 1 + tokens, width)}


def _table(decoder: Any) -> Tensor:
    """The decoder's table of positions with the learned token's zeros, as the file has it."""
    return torch.cat([torch.zeros(1, decoder.width), positions(decoder.grid, decoder.width)])[None]


def _check_table(stored: Tensor, decoder: Any) -> None:
    limit = max(_CLOSE, float(torch.finfo(stored.dtype).eps))
    if not torch.allclose(stored.float(), _table(decoder), rtol=0, atol=limit):
        raise ValueError(f"{DECODER_TABLE}: not the table of sines that its shape implies")


RAE = RAEWeights()
__all__ = ["DECODER", "RAE", "RAEWeights"]
