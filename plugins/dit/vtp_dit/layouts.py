"""Where each tensor of a published checkpoint goes in ours: names, shapes and the order of rows.

Ours are one layout for all: patches and outputs of a token are (channel, *patch), queries and keys turn channel i with
channel i + head_dim / 2, the first axis first, and a gated feed-forward is w1 (gate), w2, w3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp_dit.positions import sincos

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One foreign tensor and the tensors of ours that it holds.

    Attributes:
        theirs: its name.
        shape: its shape.
        ours: our names; several share its rows in equal parts.
        rows: its shape as rows.
        order: place among its rows of each row of ours; None keeps the order.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    rows: tuple[int, ...]
    order: Tensor | None = None

    def to_ours(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors of a foreign one."""
        rows = tensor.reshape(self.rows)
        rows = rows if self.order is None else rows[self.order]
        return {name: part.clone() for name, part in zip(self.ours, rows.chunk(len(self.ours)), strict=True)}

    def to_theirs(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse."""
        rows = torch.cat([tensors[name] for name in self.ours])
        if self.order is not None:
            rows = torch.empty_like(rows).index_copy_(0, self.order, rows)
        return rows.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the checkpoints of one code base are like.

    Attributes:
        rope: pairs of neighbouring channels turn; their order is ``axes`` (an axis after the other) or ``mixed``
            (last axis, first axis, last axis, ...); DDT's is the latter.
        patches: ``convolution`` for the patch embedding and (*patch, channel) outputs, or ``unfold`` for a matrix and
            (channel, *patch) outputs.
        modulation: index of the linear layer in ``adaLN_modulation``.
        mlp: theirs of w1, w2 and w3, where w1 and w2 may be one.
        places: the sine-cosine table is part of the state dict.
        tables: prefixes of stored rotary tables: of the only, or of the encoder's and the head's stream.
    """

    rope: str = "axes"
    patches: str = "convolution"
    modulation: int = 1
    mlp: tuple[tuple[str, tuple[str, ...]], ...] = (("w12", ("w1", "w2")), ("w3", ("w3",)))
    tables: tuple[str, ...] = ("feat_rope",)


DIT = Layout()
DDT = Layout("mixed", "unfold", 0, (("w1", ("w1",)), ("w3", ("w2",)), ("w2", ("w3",))), ())
DIT_DH = Layout(tables=("enc_feat_rope", "dec_feat_rope"))


@dataclass(frozen=True, slots=True)
class Sides:
    """A stream of blocks: our prefix, its shape and the number of its first block in theirs."""

    ours: str
    embed: str
    width: int
    heads: int
    depth: int
    first: int


def streams(options: Options) -> list[Sides]:
    """The streams of a generator with these options."""
    width, heads = options["width"], options["heads"]
    if "encoder_blocks" not in options:
        return [Sides("body", "x_embedder", width, heads, options["depth"], 0)]
    first = options["encoder_blocks"]
    return [
        Sides("body", "s_embedder", width, heads, first, 0),
        Sides(
            "head", "x_embedder", options["head_width"], options["head_heads"], options["head_blocks"], first
        ),
    ]


def parts(layout: Layout, options: Options, channels: int, classes: int) -> list[Part]:
    """Every tensor of a checkpoint that is not a constant."""
    width, patch = options["width"], options["patch"]
    waves = 512 if options["time"] == "fourier" else 256
    found = [
        *_linear("t_embedder.mlp.0", "time.fc1", (width, waves)),
        *_linear("t_embedder.mlp.2", "time.fc2", (width, width)),
        _same("y_embedder.embedding_table.weight", "condition.table.weight", (classes + 1, width)),
    ]
    if options["time"] == "fourier":
        found.append(_same("t_embedder.W", "time.frequencies", (256,)))
    if options["positions"] == "learned":
        tokens = (options["grid"][0] // patch) * (options["grid"][1] // patch)
        found.append(Part("pos_embed", (1, tokens, width), ("body.places.table",), (tokens, width)))
    both = streams(options)
    if len(both) == 2 and both[0].width != both[1].width:
        found += _linear("s_projector", "widen", (both[1].width, width))
    for sides in both:
        found += _embedding(layout, sides, channels, patch)
        for index in range(sides.depth):
            found += _block(layout, options, sides, index)
    return found + _final(layout, options, both[-1].width, channels)


def constants(layout: Layout, options: Options) -> dict[str, Tensor]:
    """Fixed tables that theirs store and ours compute, as their code computes them; float32."""
    found: dict[str, Tensor] = {}
    if "grid" not in options:
        return found
    tokens = tuple(side // options["patch"] for side in options["grid"])
    if options["positions"] == "sincos":
        found["pos_embed"] = sincos(tokens, options["width"]).float()[None]
    if options["rope"] == "grid":
        for prefix, sides in zip(layout.tables, streams(options), strict=True):
            angles = _angles(tokens[0], sides.width // sides.heads)
            found |= {f"{prefix}.freqs_cos": angles.cos(), f"{prefix}.freqs_sin": angles.sin()}
    return found


def _same(theirs: str, ours: str, shape: tuple[int, ...], order: Tensor | None = None) -> Part:
    return Part(theirs, shape, (ours,), shape, order)


def _linear(
    theirs: str, ours: str, shape: tuple[int, int], bias: bool = True, order: Tensor | None = None
) -> Iterator[Part]:
    yield _same(f"{theirs}.weight", f"{ours}.weight", shape, order)
    if bias:
        yield _same(f"{theirs}.bias", f"{ours}.bias", shape[:1], order)


def _embedding(layout: Layout, sides: Sides, channels: int, patch: int) -> Iterator[Part]:
    rows = (sides.width, channels * patch**2)
    shape = rows if layout.patches == "unfold" else (sides.width, channels, patch, patch)
    yield Part(f"{sides.embed}.proj.weight", shape, (f"{sides.ours}.embed.proj.weight",), rows)
    yield _same(f"{sides.embed}.proj.bias", f"{sides.ours}.embed.proj.bias", rows[:1])


def _block(layout: Layout, options: Options, sides: Sides, index: int) -> Iterator[Part]:
    theirs, ours = f"blocks.{sides.first + index}", f"{sides.ours}.blocks.{index}"
    width, dim = sides.width, sides.width // sides.heads
    turns = None if options["rope"] == "none" else _turns(dim, layout.rope)
    for name in ("norm1", "norm2") if options["norm"] == "rms" else ():
        yield _same(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (width,))
    rows = None if turns is None else _qkv(turns, sides.heads)
    yield from _linear(
        f"{theirs}.attn.qkv", f"{ours}.attn.qkv", (3 * width, width), options["qkv_bias"], rows
    )
    for name in ("q_norm", "k_norm") if options["qk_norm"] != "none" else ():
        yield _same(f"{theirs}.attn.{name}.weight", f"{ours}.attn.{name}.weight", (dim,), turns)
        if options["qk_norm"] == "layer":
            yield _same(f"{theirs}.attn.{name}.bias", f"{ours}.attn.{name}.bias", (dim,), turns)
    yield from _linear(f"{theirs}.attn.proj", f"{ours}.attn.proj", (width, width))
    yield from _mlp(layout, options, f"{theirs}.mlp", f"{ours}.mlp", width)
    shape = ((6 if options["shift"] else 4) * width, width)
    yield from _linear(f"{theirs}.adaLN_modulation.{layout.modulation}", f"{ours}.modulation", shape)


def _mlp(layout: Layout, options: Options, theirs: str, ours: str, width: int) -> Iterator[Part]:
    hidden, bias = int(width * options["mlp_ratio"]), options["mlp_bias"]
    if options["mlp"] == "gelu":
        yield from _linear(f"{theirs}.fc1", f"{ours}.fc1", (hidden, width), bias)
        yield from _linear(f"{theirs}.fc2", f"{ours}.fc2", (width, hidden), bias)
        return
    hidden = 2 * hidden // 3
    for name, held in layout.mlp:
        shape = (width, hidden) if held == ("w3",) else (len(held) * hidden, width)
        for kind, size in (("weight", shape), ("bias", shape[:1])) if bias else (("weight", shape),):
            yield Part(f"{theirs}.{name}.{kind}", size, tuple(f"{ours}.{part}.{kind}" for part in held), size)


def _final(layout: Layout, options: Options, width: int, channels: int) -> list[Part]:
    patch, outputs = options["patch"], channels * (2 if options["variance"] else 1)
    order = None
    if layout.patches == "convolution":
        order = torch.arange(patch**2 * outputs).view(-1, outputs).T.flatten()
    found = [
        *_linear("final_layer.linear", "final.proj", (patch**2 * outputs, width), order=order),
        *_linear(f"final_layer.adaLN_modulation.{layout.modulation}", "final.modulation", (2 * width, width)),
    ]
    if options["final_norm"] == "rms":
        found.append(_same("final_layer.norm_final.weight", "final.norm.weight", (width,)))
    return found


def _turns(dim: int, order: str) -> Tensor:
    """Their channel of each of our channels of one head, (dim,)."""
    pairs = torch.arange(dim // 2)
    if order == "mixed":
        pairs = pairs.view(-1, 2).flip(1).T.flatten()  # last axis, first axis, ... -> first axis, then last
    return torch.cat([2 * pairs, 2 * pairs + 1])


def _qkv(turns: Tensor, heads: int) -> Tensor:
    """Their row of each of our rows of queries, keys and values, (3 * D,)."""
    dim = len(turns)
    by_head = dim * torch.arange(heads)[:, None]
    turned = (by_head + turns).flatten()
    return torch.cat([turned, len(turned) + turned, 2 * len(turned) + torch.arange(len(turned))])


def _angles(side: int, dim: int) -> Tensor:
    """Angles of every channel, (side ** 2, dim) float32."""
    half = dim // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
    places = torch.arange(side) / side * side
    angles = (places[:, None] * frequencies).repeat_interleave(2, dim=1)  # (side, dim / 2)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)
