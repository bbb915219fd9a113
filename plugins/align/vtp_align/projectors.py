"""Trainable maps from one side's channels to the other's (REPA, iREPA, VA-VAE, Semantic-VAE)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vtp_align.maps import Grid, as_map, as_tokens
from vtp_plugins.errors import suggestion
from vtp_plugins.spec import Spec

Kind = Literal["linear", "mlp3", "conv3x3", "conv_mish"]
Of = Literal["auto", "student", "generator", "ema"]
Side = Literal["student", "teacher"]
FEATURES = ("cls", "patches", "hidden:", "latent", "decoder.hidden:")


class Projector(nn.Module):
    """One map of tokens; as an entry of the stack's ``modules`` several alignments share it.

    Args:
        spec: tells both widths.
        to: name of the teacher.
        on: the output that is aligned.
        of: who gives it, as for ``align``.
        kind: ``linear`` is one matrix (VA-VAE's 1x1 convolution); ``mlp3`` is linear-SiLU-linear-SiLU-linear
            (REPA); ``conv3x3`` one convolution on the grid (iREPA); ``conv_mish`` two of convolution,
            one-group norm and Mish, then a 1x1 convolution (Semantic-VAE).
        hidden: width inside ``mlp3`` and ``conv_mish``.
        bias: of ``linear``; JMAS-VAE has one.
        side: whose tokens are mapped to the other's width.
        width: channels of ``on``, where a decoder's are not the encoder's.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"hidden": 256}}

    def __init__(
        self,
        spec: Spec,
        *,
        to: str,
        on: str = "patches",
        of: Of = "auto",
        kind: Kind = "mlp3",
        hidden: Annotated[int, Field(gt=0)] = 2048,
        bias: bool = False,
        side: Side = "student",
        width: Annotated[int, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__()
        inner, outer = student_width(spec, on, of, width), teacher_width(spec, to)
        self.reads, self.gives = (inner, outer) if side == "student" else (outer, inner)
        self.kind = kind
        self.layers = nn.Sequential(*_layers(kind, self.reads, hidden, self.gives, len(spec.size), bias))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, reads) on a grid to (B, N, gives)."""
        if self.kind in {"linear", "mlp3"}:
            return self.layers(x)  # type: ignore[no-any-return]
        return as_tokens(self.layers(as_map(x, grid)))


def _layers(kind: Kind, reads: int, hidden: int, gives: int, axes: int, bias: bool) -> list[nn.Module]:
    if kind == "linear":
        return [nn.Linear(reads, gives, bias=bias)]
    if kind == "mlp3":
        first, second = nn.Linear(reads, hidden), nn.Linear(hidden, hidden)
        return [first, nn.SiLU(), second, nn.SiLU(), nn.Linear(hidden, gives)]
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    if kind == "conv3x3":
        return [conv(reads, gives, 3, padding=1)]
    blocks: list[nn.Module] = []
    for width in (reads, hidden):
        blocks += [conv(width, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.Mish()]
    return [*blocks, conv(hidden, gives, 1)]


def source_of(spec: Spec, on: str, of: Of) -> str:
    """Who gives ``on``: ``auto`` is the generator for ``hidden:k`` where there is one, else the student.

    Raises:
        ValueError: the output is no tokens, or not of that source.
    """
    if "@" in on or not on.startswith(FEATURES) or on == "latent.indices":
        raise ValueError(f"on: {on!r} is none of cls, patches, hidden:k, latent..., decoder.hidden:k")
    hidden = on.startswith("hidden:")
    source = of if of != "auto" else "generator" if hidden and spec.generator_width else "student"
    if source == "generator" and not hidden:
        raise ValueError(f"on: a generator gives hidden:k, not {on!r}; or set of: student")
    if source == "generator" and not spec.generator_width:
        raise ValueError("of: generator, but the stack has no generator; add one, or set of: student")
    if source == "ema" and on.startswith("decoder."):
        raise ValueError("of: ema has no decoder; set of: student")
    return source


def student_width(spec: Spec, on: str, of: Of, width: int | None = None) -> int:
    """Channels of ``on``: as written, else what the spec says."""
    if width is not None:
        return width
    if source_of(spec, on, of) == "generator":
        return spec.generator_width
    return spec.width_of(on.removeprefix("decoder."))


def teacher_width(spec: Spec, to: str) -> int:
    """Channels of a teacher.

    Raises:
        LookupError: the stack has no such teacher.
    """
    known = dict(spec.teachers)
    if to not in known:
        raise LookupError(f"to: no {to!r} under 'teachers'{suggestion(to, known)}")
    return known[to]
