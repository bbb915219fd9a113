"""A condition encoder and a velocity decoder: DDT (arXiv 2504.05741) and DiT-DH (RAE, arXiv 2510.11690)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from vtp_dit.network import Network, activated
from vtp_dit.plain import Count, Positive
from vtp_dit.stream import Stream
from vtp_dit.switches import (
    DIAL,
    HeadNorm,
    Mlp,
    Norm,
    Positions,
    Rotary,
    Size,
    Switches,
    Time,
    shape_of,
)
from vtp_plugins.spec import Spec


class Decoupled(Network):
    """A transformer whose encoder is conditioned on time and class, and its head, token by token, on the encoder.

    With s the encoder's tokens: ``state`` = SiLU(time + s), (R, N, D). Given a ``state``, neither the encoder
    nor time and condition are looked at. ``hidden:k`` counts the encoder's blocks first.

    An option that is None takes its family's value, which :class:`vtp_dit.switches.Switches` explains.

    Args:
        spec: channels and grid of the latent, what conditions and how many classes there are.
        size: a published size: ``tiny s b l xl 1p0b 1p6b``; what is written below wins over it.
        width: D of the encoder.
        heads: attention heads of the encoder.
        encoder_blocks: blocks of the encoder.
        head_blocks: blocks of the head.
        head_width: width of the head.
        head_heads: attention heads of the head.
        patch: cells of the latent that make a token, along every axis.
        grid: cells along each axis that a learned position table is made for; None takes the spec's.
        flip: the weights' time runs from noise to data: they are fed 1 - u, and a velocity (the path's
            ``predicts``) is negated.
        timesteps: steps T of a discrete process: u T - 1 is fed; 0 for a continuous one.
        norm: of the blocks.
        final_norm: before the last layer.
        qk_norm: on queries and keys.
        mlp: kind of feed-forward.
        mlp_ratio: its hidden width over D.
        qkv_bias: biases of queries, keys and values.
        mlp_bias: biases of the feed-forward.
        rope: rotary positions, in the encoder and in the head.
        positions: positions added to the encoder's tokens.
        shift: whether the blocks' modulation shifts.
        time: embedding of the time.
        max_period: longest period of its sines.
        variance: learn a variance beside the prediction.
        zero: start the blocks as the identity.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = DIAL
    family: ClassVar[Switches] = Switches()
    family_patch: ClassVar[int] = 1

    def __init__(
        self,
        spec: Spec,
        *,
        size: Size = "tiny",
        width: Count = None,
        heads: Count = None,
        encoder_blocks: Count = None,
        head_blocks: Count = None,
        head_width: Count = None,
        head_heads: Count = None,
        patch: Count = None,
        grid: tuple[int, ...] | None = None,
        flip: bool = False,
        timesteps: Annotated[int, Field(ge=0)] = 0,
        norm: Norm | None = None,
        final_norm: Norm | None = None,
        qk_norm: HeadNorm | None = None,
        mlp: Mlp | None = None,
        mlp_ratio: Positive = None,
        qkv_bias: bool | None = None,
        mlp_bias: bool | None = None,
        rope: Rotary | None = None,
        positions: Positions | None = None,
        shift: bool | None = None,
        time: Time | None = None,
        max_period: Positive = None,
        variance: bool | None = None,
        zero: bool | None = None,
    ) -> None:
        given = locals()
        switches = self.family.written({key: given[key] for key in Switches.options()})
        shape = shape_of(size)
        width, heads = width or shape.width, heads or shape.heads
        own_width, own_heads, own_encoder, own_head = self.head_of(size, width, heads)
        encoder_blocks, head_blocks = encoder_blocks or own_encoder, head_blocks or own_head
        head_width, head_heads = head_width or own_width, head_heads or own_heads
        super().__init__(
            spec, width, head_width, encoder_blocks + head_blocks, patch or self.family_patch, switches, flip,
            timesteps or None,
        )  # fmt: skip
        self.encoder_blocks = encoder_blocks
        places = self.places(grid, spec, width)
        self.body = Stream(spec.channels, self.patch, width, encoder_blocks, heads, switches, places)
        self.widen = nn.Linear(width, head_width) if head_width != width else None
        self.head = Stream(spec.channels, self.patch, head_width, head_blocks, head_heads, switches, None)

    def head_of(self, size: str, width: int, heads: int) -> tuple[int, int, int, int]:
        """The family's width and heads of the head and blocks of the encoder and of the head."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Any,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        """As :class:`vtp_plugins.protocols.Generator` says; ``state`` (R, N, D) is the encoder's."""
        levels = self.levels(want, {"state": self.encoder_blocks})
        grid = self.grid_of(x)
        last = max(levels.values(), default=0)
        found: dict[str, Any] = {}
        if state is None:
            state, found = self._encode(x, u, condition, want, grid, last)
        elif lost := sorted(
            name for name, level in levels.items() if level <= self.encoder_blocks and name != "state"
        ):
            raise LookupError(f"{', '.join(lost)}: of the encoder, which a given state replaces")
        if "state" in want:
            found["state"] = state
        if last <= self.encoder_blocks:
            return found
        c = state if self.widen is None else self.widen(state).to(x.dtype)
        c = activated(c, 1 if self.switches.double_silu else 0)
        tokens, hidden = self.head.run(self.head.tokens(x, grid), c, grid, want, self.encoder_blocks, last)
        found |= hidden
        if want & {"prediction", "variance"}:
            found |= self.outputs(tokens, c, grid, want)
        return found

    def _encode(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Any,
        want: frozenset[str],
        grid: tuple[int, ...],
        last: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The state, and what is wanted of the encoder."""
        time, c = self.conditioning(x, u, condition)
        c = activated(c, 2 if self.switches.double_silu else 1)
        tokens, found = self.body.run(self.body.tokens(x, grid), c, grid, want, 0, last)
        return activated(time + tokens), found


class DDT(Decoupled):
    """DDT (arXiv 2504.05741): one width; B is 8 + 4 blocks, L 20 + 4, XL 22 + 6; RoPE over a span of 16, no biases.

    Args:
        spec: as for :class:`Decoupled`, whose options it has.
    """

    family = Switches(
        norm="rms", qk_norm="rms", mlp="swiglu", qkv_bias=False, mlp_bias=False, rope="span",
        positions="none", max_period=10.0, zero=False, xavier=False,
    )  # fmt: skip
    family_patch = 2

    def head_of(self, size: str, width: int, heads: int) -> tuple[int, int, int, int]:
        shape = shape_of(size)
        return width, heads, shape.encoder, shape.depth - shape.encoder


class DiTDH(Decoupled):
    """DiT-DH (RAE, arXiv 2510.11690): a backbone of a published size under a head of 2 blocks of width 2048.

    Args:
        spec: as for :class:`Decoupled`, whose options it has.
    """

    family = Switches(
        norm="rms",
        final_norm="rms",
        mlp="swiglu",
        rope="grid",
        time="fourier",
        double_silu=True,
        xavier=False,
    )

    def head_of(self, size: str, width: int, heads: int) -> tuple[int, int, int, int]:
        wide, count = (384, 6) if size.lower() == "tiny" else (2048, 16)
        return wide, count, shape_of(size).depth, 2
