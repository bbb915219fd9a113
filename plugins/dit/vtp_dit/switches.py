"""What the diffusion transformers differ in, and their published sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

Norm = Literal["layer", "rms"]
HeadNorm = Literal["none", "layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Rotary = Literal["none", "grid", "span"]
Positions = Literal["none", "sincos", "learned"]
Time = Literal["sincos", "fourier"]


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


SizeName = Literal["tiny", "s", "b", "l", "xl", "1p0b", "1p6b"]
Size = Annotated[SizeName, BeforeValidator(_lower)]


@dataclass(frozen=True, slots=True)
class Shape:
    """Width, blocks and heads of one published size; ``encoder`` of its blocks are DDT's encoder."""

    width: int
    depth: int
    heads: int
    encoder: int


SHAPES: dict[str, Shape] = {
    "tiny": Shape(192, 6, 3, 4),
    "s": Shape(384, 12, 6, 8),
    "b": Shape(768, 12, 12, 8),
    "l": Shape(1024, 24, 16, 20),
    "xl": Shape(1152, 28, 16, 22),
    "1p0b": Shape(1536, 24, 24, 20),
    "1p6b": Shape(1792, 28, 28, 22),
}
DIAL: dict[str, dict[str, Any]] = {name: {"size": name} for name in ("tiny", "s", "b", "l")}


def shape_of(size: str) -> Shape:
    """The shape behind a name, in upper or lower case.

    Raises:
        ValueError: there is no such size.
    """
    if size.lower() not in SHAPES:
        raise ValueError(f"size: no {size!r}; known: {', '.join(SHAPES)}")
    return SHAPES[size.lower()]


@dataclass(frozen=True, slots=True)
class Switches:
    """One family's choices; every field but the last two is also an option of its generators.

    Attributes:
        norm: of the blocks: LayerNorm without weights, or RMSNorm with; eps 1e-6.
        final_norm: the same before the last layer.
        qk_norm: on queries and keys by head: ``rms`` (eps 1e-6), ``layer`` (with weights, eps 1e-5).
        mlp: ``gelu`` (tanh form), or ``swiglu`` at two thirds of the hidden width.
        mlp_ratio: hidden width over width.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_bias: whether the feed-forward has biases.
        rope: axial rotary positions with base 10^4: ``grid`` counts tokens, ``span`` spreads every grid
            over 0..16.
        positions: added to the tokens: a fixed sine-cosine table of the actual grid, or a learned one.
        shift: whether the blocks are shifted, not only scaled and gated.
        time: embedding of the time: sines and cosines of fixed periods, or of 256 random frequencies.
        max_period: longest period of the former, over 2 pi.
        variance: whether the last layer gives a second set of channels: the output ``variance``.
        zero: whether blocks start as the identity (adaLN-Zero).
        double_silu: SiLU once more on what modulates (DiT-DH).
        xavier: Xavier-uniform linear layers without biases; else PyTorch's own.
    """

    norm: Norm = "layer"
    final_norm: Norm = "layer"
    qk_norm: HeadNorm = "none"
    mlp: Mlp = "gelu"
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    mlp_bias: bool = True
    rope: Rotary = "none"
    positions: Positions = "sincos"
    shift: bool = True
    time: Time = "sincos"
    max_period: float = 1e4
    variance: bool = False
    zero: bool = True
    double_silu: bool = False
    xavier: bool = True

    FIXED: ClassVar[frozenset[str]] = frozenset({"double_silu", "xavier"})

    @classmethod
    def options(cls) -> list[str]:
        """Names of the fields that are options."""
        return [field.name for field in fields(cls) if field.name not in cls.FIXED]

    def written(self, options: dict[str, Any]) -> Switches:
        """These switches with the options that are written, those that are not None."""
        return replace(self, **{key: value for key, value in options.items() if value is not None})


LIGHTNING = Switches(norm="rms", final_norm="rms", mlp="swiglu", rope="grid")
"""LightningDiT (arXiv 2501.01423)."""
