"""One stream of blocks from latent to prediction: DiT, SiT and LightningDiT."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from vtp_dit.network import Network, activated
from vtp_dit.stream import Stream
from vtp_dit.switches import (
    DIAL,
    LIGHTNING,
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

Count = Annotated[int | None, Field(gt=0)]
Positive = Annotated[float | None, Field(gt=0)]


class Transformer(Network):
    """A diffusion transformer of one stream.

    An option that is None takes its family's value, which :class:`vtp_dit.switches.Switches` explains.

    Args:
        spec: channels and grid of the latent, what conditions and how many classes there are.
        size: a published size: ``tiny s b l xl 1p0b 1p6b``; the next three options win over it.
        width: D.
        depth: blocks.
        heads: attention heads.
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
        rope: rotary positions.
        positions: positions added to the tokens.
        shift: whether the blocks' modulation shifts.
        time: embedding of the time.
        max_period: longest period of its sines.
        variance: learn a variance beside the prediction.
        zero: start the blocks as the identity.
    """

    sizes: ClassVar[dict[str, dict[str, Any]]] = DIAL
    family: ClassVar[Switches] = Switches()
    family_patch: ClassVar[int] = 2
    family_timesteps: ClassVar[int] = 0

    def __init__(
        self,
        spec: Spec,
        *,
        size: Size = "tiny",
        width: Count = None,
        depth: Count = None,
        heads: Count = None,
        patch: Count = None,
        grid: tuple[int, ...] | None = None,
        flip: bool = False,
        timesteps: Annotated[int | None, Field(ge=0)] = None,
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
        width, depth, heads = width or shape.width, depth or shape.depth, heads or shape.heads
        steps = self.family_timesteps if timesteps is None else timesteps
        super().__init__(spec, width, width, depth, patch or self.family_patch, switches, flip, steps or None)
        places = self.places(grid, spec, width)
        self.body = Stream(spec.channels, self.patch, width, depth, heads, switches, places)

    def forward(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Any,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        """As :class:`vtp_plugins.protocols.Generator` says; there is no ``state`` to reuse."""
        if state is not None:
            raise ValueError("state: this generator has none to reuse; ddt and dit_dh have")
        levels = self.levels(want, {})
        grid = self.grid_of(x)
        c = activated(self.conditioning(x, u, condition)[1], 2 if self.switches.double_silu else 1)
        last = max(levels.values(), default=0)
        tokens, found = self.body.run(self.body.tokens(x, grid), c, grid, want, 0, last)
        if want & {"prediction", "variance"}:
            found |= self.outputs(tokens, c, grid, want)
        return found


class DiT(Transformer):
    """DiT (arXiv 2212.09748): predicts noise on a discrete path (``ddpm``) and learns its variance.

    Args:
        spec: as for :class:`Transformer`, whose options it has.
    """

    family = Switches(variance=True)
    family_timesteps = 1000


class SiT(Transformer):
    """SiT (arXiv 2401.08740): DiT's network with continuous time.

    It keeps DiT's second set of output channels, as published, and computes it only where ``variance`` is read.

    Args:
        spec: as for :class:`Transformer`, whose options it has.
    """

    family = Switches(variance=True)


class LightningDiT(Transformer):
    """LightningDiT (arXiv 2501.01423): SwiGLU, RMSNorm and RoPE on every cell of a deep latent.

    Args:
        spec: as for :class:`Transformer`, whose options it has.
    """

    family = LIGHTNING
    family_patch = 1
