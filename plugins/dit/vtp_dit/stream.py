"""Blocks of one width in order, with their embedding of the latent."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from vtp_core.models.vit import PatchEmbed
from vtp_dit.block import Block, SwiGLU
from vtp_dit.positions import Places, Rotation
from vtp_dit.switches import Switches


class Stream(nn.Module):
    """Blocks of one width with their embedding of the input.

    Args:
        given: values of one token of the input.
        patch: cells of the latent that make a token, along each axis.
        width: D.
        depth: blocks.
        heads: attention heads.
        switches: the family's.
        places: added to the tokens; None adds nothing.
    """

    def __init__(
        self,
        given: int,
        patch: tuple[int, ...],
        width: int,
        depth: int,
        heads: int,
        switches: Switches,
        places: Places | None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError("depth: a generator needs one block at least in each of its parts")
        self.embed = PatchEmbed(given, patch, width)
        self.places = places
        self.blocks = nn.ModuleList(Block(width, heads, switches) for _ in range(depth))
        self.rotation = None
        if switches.rope != "none":
            self.rotation = Rotation(width // heads, len(patch), switches.rope)
        _reset(self, switches)

    def tokens(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Latents x (R, C, *cells) to tokens (R, N, D) in the dtype of x."""
        tokens: Tensor = self.embed(x).to(x.dtype)  # under autocast the residual stream stays as it came
        return tokens if self.places is None else self.places(tokens, grid)

    def run(
        self, x: Tensor, c: Tensor, grid: tuple[int, ...], want: Iterable[str], before: int, last: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run blocks in order.

        Args:
            x: tokens (R, N, D).
            c: the activated condition, (R or 1, N or 1, D).
            grid: tokens along each axis.
            want: outputs that are read; ``hidden:k`` counts the blocks ``before`` too.
            before: blocks of earlier streams.
            last: the last block that is read from, counted likewise.

        Returns:
            The tokens after the last block, and each ``hidden:k`` that is wanted.
        """
        tables = None if self.rotation is None else self.rotation.tables(grid, x)
        hidden = {}
        for level, block in enumerate(self.blocks, start=before + 1):
            if level > last:
                break
            x = block(x, c, tables)
            if f"hidden:{level}" in want:
                hidden[f"hidden:{level}"] = x
        return x, hidden


def _reset(stream: Stream, switches: Switches) -> None:
    """Draw a stream as its family does."""
    if switches.xavier:
        for part in stream.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
    nn.init.xavier_uniform_(stream.embed.proj.weight)
    nn.init.zeros_(stream.embed.proj.bias)
    for block in stream.blocks:
        assert isinstance(block, Block)
        if switches.xavier and isinstance(block.mlp, SwiGLU):
            _as_one(block.mlp.w1, block.mlp.w2)
        if switches.zero:
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)


def _as_one(first: nn.Linear, second: nn.Linear) -> None:
    """Xavier-uniform as if both were one layer, which they are in LightningDiT's weights."""
    bound = math.sqrt(6 / (first.in_features + 2 * first.out_features))
    nn.init.uniform_(first.weight, -bound, bound)
    nn.init.uniform_(second.weight, -bound, bound)
