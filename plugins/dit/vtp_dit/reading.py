"""What the shapes of a published checkpoint tell of its network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_dit import layouts
from vtp_dit.layouts import Layout
from vtp_dit.switches import SHAPES

_HEADS = {shape.width: shape.heads for name, shape in SHAPES.items() if name != "tiny"}
_ENCODERS = {shape.width: shape.encoder for name, shape in SHAPES.items() if name in {"b", "l", "xl"}}


class Reading:
    """Options of a generator off the shapes of a checkpoint.

    Args:
        layout: of the code base.
        fixed: options that shapes don't tell.
        streams: streams of blocks.
        tensors: the network's state dict.
        known: options that the caller says.
    """

    def __init__(
        self,
        layout: Layout,
        fixed: Mapping[str, Any],
        streams: int,
        tensors: Mapping[str, Tensor],
        known: Mapping[str, Any],
    ) -> None:
        self.layout, self.fixed, self.streams = layout, fixed, streams
        self.tensors, self.known = tensors, known
        self.embed = "x_embedder" if streams == 1 else "s_embedder"
        self.width = shape_in(tensors, f"{self.embed}.proj.weight")[0]
        self.patch = int(known.get("patch", self._patch()))
        self.depth = 1 + max(
            (int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1
        )

    def options(self) -> dict[str, Any]:
        blocks = self._blocks()
        options = {"width": self.width, **blocks, "patch": self.patch, **self._switches()}
        options["positions"], grid = self._positions(options)
        if grid is not None:
            options["grid"] = grid
        return {**options, **self._time(), **self.known}

    def _has(self, name: str) -> bool:
        return name in self.tensors

    def _patch(self) -> int:
        shape = shape_in(self.tensors, f"{self.embed}.proj.weight")
        return shape[2] if len(shape) == 4 else 2

    def _blocks(self) -> dict[str, int]:
        if self.streams == 1:
            return {"depth": self.depth, "heads": self._heads(0, self.width)}
        wide = shape_in(self.tensors, "x_embedder.proj.weight")[0]
        first = self._encoder(wide)
        return {
            "encoder_blocks": first,
            "head_blocks": self.depth - first,
            "heads": self._heads(0, self.width),
            "head_width": wide,
            "head_heads": self._heads(1, wide),
        }

    def _encoder(self, wide: int) -> int:
        """Blocks of the encoder: those of its width, else by the published sizes."""
        if wide != self.width:
            return sum(
                shape_in(self.tensors, f"blocks.{index}.attn.proj.weight")[0] == self.width
                for index in range(self.depth)
            )
        first = self.known.get("encoder_blocks", _ENCODERS.get(self.width))
        if first is None:
            raise ValueError(
                f"encoder_blocks: width {self.width} is not published; say how many blocks it has"
            )
        return int(first)

    def _heads(self, stream: int, width: int) -> int:
        """Heads by stored rotary tables or head norms, else by the published sizes."""
        first = 0 if stream == 0 else self.depth - 1
        tables = self.layout.tables
        places = [f"blocks.{first}.attn.q_norm.weight"]
        if tables:
            places.append(f"{tables[stream]}.freqs_cos")
        for name in places:
            if self._has(name):
                return width // shape_in(self.tensors, name)[-1]
        heads = self.known.get("heads" if stream == 0 else "head_heads", _HEADS.get(width))
        if heads is None:
            raise ValueError(
                f"heads: width {width} is not published and the weights don't tell; say how many"
            )
        return int(heads)

    def _switches(self) -> dict[str, Any]:
        first, flat = "blocks.0", self.layout.patches == "unfold"
        gelu = self._has(f"{first}.mlp.fc1.weight")
        name = "fc1" if gelu else self.layout.mlp[0][0]
        hidden = shape_in(self.tensors, f"{first}.mlp.{name}.weight")[0]
        hidden //= 1 if gelu else len(self.layout.mlp[0][1])
        norms = "none"
        if self._has(f"{first}.attn.q_norm.weight"):
            norms = "layer" if self._has(f"{first}.attn.q_norm.bias") else "rms"
        values = shape_in(self.tensors, "x_embedder.proj.weight")[1:].numel()
        rotary = "span" if flat else "none"
        if any(self._has(f"{table}.freqs_cos") for table in self.layout.tables):
            rotary = "grid"
        shifted = shape_in(self.tensors, f"{first}.adaLN_modulation.{self.layout.modulation}.weight")[0]
        return {
            "norm": "rms" if self._has(f"{first}.norm1.weight") else "layer",
            "final_norm": "rms" if self._has("final_layer.norm_final.weight") else "layer",
            "qk_norm": norms,
            "mlp": "gelu" if gelu else "swiglu",
            "mlp_ratio": _ratio(self.width, hidden, gelu),
            "qkv_bias": self._has(f"{first}.attn.qkv.bias"),
            "mlp_bias": self._has(f"{first}.mlp.{name}.bias"),
            "rope": rotary,
            "shift": shifted == 6 * self.width,
            "variance": shape_in(self.tensors, "final_layer.linear.weight")[0] == 2 * values,
        }

    def _positions(self, options: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
        """Kind of the position table, and the cells along each axis where the weights tell."""
        tables = [name for name in self.tensors if name == "pos_embed" or name.endswith(".freqs_cos")]
        if not tables:
            return "none", None
        tokens = max(self.tensors[name].shape[-2] for name in tables)
        side = round(tokens**0.5)
        if side**2 != tokens:
            raise ValueError(f"{tables[0]}: {tokens} tokens are no square")
        grid = (side * self.patch, side * self.patch)
        if not self._has("pos_embed"):
            return "none", grid
        fixed = layouts.constants(
            self.layout, {**options, "positions": "sincos", "rope": "none", "grid": grid}
        )
        table = self.tensors["pos_embed"]
        return "sincos" if torch.equal(fixed["pos_embed"].to(table.dtype), table) else "learned", grid

    def _time(self) -> dict[str, Any]:
        """Options of time: Gaussian frequencies tell RAE's networks, whose time runs as ours."""
        if not self._has("t_embedder.W"):
            return {"time": "sincos", **self.fixed}
        return {"time": "fourier", **self.fixed, "flip": False}


def _ratio(width: int, hidden: int, gelu: bool) -> float:
    """The ratio that gives so many hidden channels."""
    whole = hidden if gelu else -(-3 * hidden // 2)
    usual = 4 * width if gelu else 2 * (4 * width) // 3
    return 4.0 if hidden == usual else (whole + 0.25) / width


def shape_in(tensors: Mapping[str, Tensor], name: str) -> torch.Size:
    """Shape of a tensor that must be there.

    Raises:
        ValueError: it is missing.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing: these are not such weights, or not those of the network alone")
    return tensors[name].shape
