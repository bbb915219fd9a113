"""Names and shapes of our tensors in the checkpoints of CompVis and of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

_HEADS = {"bottleneck.links.0.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
_MATRIX = re.compile(r"\.(attn\.\d+|attn_1)\.(q|k|v|proj_out)\.weight$")


@dataclass(frozen=True, slots=True)
class Layout:
    """How one code base names and shapes what we name as LDM does.

    Attributes:
        rules: pattern -> replacement, all applied in order; none keeps our names.
        matrices: attention's 1x1 convolutions are stored as matrices.
        upwards: levels of the decoder are counted from the latent.
    """

    rules: Mapping[str, str] = field(default_factory=dict)
    matrices: bool = False
    upwards: bool = False

    def name(self, ours: str, levels: int) -> str:
        """Their name of our tensor (``encoder...``, ``bottleneck.links.0...``, ``decoder...``)."""
        for prefix, theirs in _HEADS.items():
            if ours.startswith(prefix):
                return theirs + ours.removeprefix(prefix)
        name = ours
        if self.upwards:
            name = re.sub(r"^decoder\.up\.(\d+)", lambda at: f"decoder.up.{levels - 1 - int(at[1])}", name)
        for pattern, replacement in self.rules.items():
            name = re.sub(pattern, replacement, name)
        return name

    def shape(self, ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Their shape of our tensor."""
        if ours == "bottleneck.links.0.quant_conv.weight":
            return (*shape, 1, 1)
        if self.matrices and _MATRIX.search(ours):
            return shape[:2]
        return shape

    def theirs(self, ours: str, tensor: Tensor) -> Tensor:
        """Our tensor in their shape."""
        return tensor.reshape(self.shape(ours, tuple(tensor.shape)))


def _attention(query: str, key: str, value: str, out: str) -> dict[str, str]:
    """Rules for the layers of attention, wherever it stands."""
    place = r"\.(attn\.\d+|attn_1)\."
    renamed = {"norm": "group_norm", "q": query, "k": key, "v": value, "proj_out": out}
    return {rf"{place}{ours}\.": rf".\1.{theirs}." for ours, theirs in renamed.items()}


_PLACES = {
    r"^encoder\.down\.(\d+)": r"encoder.down_blocks.\1",
    r"^decoder\.up\.(\d+)": r"decoder.up_blocks.\1",
    r"\.block\.(\d+)\.": r".resnets.\1.",
    r"\.attn\.(\d+)\.": r".attentions.\1.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.(down|up)sample\.conv\.": r".\1samplers.0.conv.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
}

COMPVIS = Layout()
DIFFUSERS = Layout({**_attention("to_q", "to_k", "to_v", "to_out.0"), **_PLACES}, matrices=True, upwards=True)
DIFFUSERS_OLD = Layout(
    {**_attention("query", "key", "value", "proj_attn"), **_PLACES}, matrices=True, upwards=True
)
