"""What every diffusion transformer here shares: conditioning, output, and what may be asked of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_dit.block import Final
from vtp_dit.conditioning import TimeEmbedding, condition_of
from vtp_dit.positions import Places
from vtp_dit.switches import Switches
from vtp_plugins.errors import suggestion
from vtp_plugins.spec import Spec

_NEAR = 1e-3
MEANINGS = ("velocity", "noise", "data", "score")
"""Predictions whose sign in the other direction of time is known."""


class NarrowWarning(UserWarning):
    """A generator is narrower than a token of its latent: its error has a floor that depth does not lower."""


class Network(nn.Module):
    """Input and output of a generator; subclasses say what lies between.

    Args:
        spec: ``channels``, ``grid``, ``classes`` and ``condition`` are read.
        width: D of the tokens that ``hidden:k`` gives and of what conditions.
        last: width of the blocks before the output.
        depth: blocks of all streams.
        patch: cells of the latent that make a token, along every axis.
        switches: the family's.
        flip: whether the weights speak of time from noise to data: they are fed 1 - u, and a velocity that they
            answer is negated. Noise, data and score mean the same in both directions. What they answer is the
            path's ``predicts``; without a path, a velocity.
        timesteps: T of a discrete process, whose network is fed u T - 1; None feeds u.
    """

    def __init__(
        self,
        spec: Spec,
        width: int,
        last: int,
        depth: int,
        patch: int,
        switches: Switches,
        flip: bool,
        timesteps: int | None,
    ) -> None:
        super().__init__()
        if spec.channels < 1:
            raise ValueError(
                "a generator needs a tokenizer with a bottleneck: the latent's channels are unknown"
            )
        if flip and timesteps is not None:
            raise ValueError("flip: a process of timesteps has no other direction; drop flip or timesteps")
        self.predicts: str = getattr(spec.path, "predicts", "velocity")
        if flip and self.predicts not in MEANINGS:
            raise ValueError(
                f"flip: the path predicts {self.predicts!r}, whose sign in the other direction of time is unknown; "
                f"drop flip, or take a path that predicts {', '.join(MEANINGS)}"
            )
        self.width, self.depth, self.channels = width, depth, spec.channels
        self.patch = (patch,) * len(spec.size)
        self.flip, self.timesteps, self.switches = flip, timesteps, switches
        values = spec.channels * math.prod(self.patch)
        if last < values:
            warnings.warn(
                f"generator.width: {last} is less than the {values} values of a latent token; such a generator "
                "cannot fit even one picture (arXiv 2510.11690); widen it, or lower generator.patch",
                NarrowWarning,
                stacklevel=2,
            )
        self.values = values
        self.time = TimeEmbedding(width, switches.time, switches.max_period)
        self.condition = condition_of(spec, width)
        self.final = Final(last, values * (2 if switches.variance else 1), switches)

    def grid_of(self, x: Tensor) -> tuple[int, ...]:
        """Tokens along each axis of latents x (R, C, *cells).

        Raises:
            ValueError: x has other channels or axes, or is no multiple of the patch.
        """
        cells = tuple(x.shape[2:])
        if x.ndim != 2 + len(self.patch) or x.shape[1] != self.channels:
            raise ValueError(f"the generator reads (R, {self.channels}, *grid), not {tuple(x.shape)}")
        if any(side % p or side < p for side, p in zip(cells, self.patch, strict=True)):
            raise ValueError(f"generator.patch: {self.patch[0]} does not divide a latent of {cells} cells")
        return tuple(side // p for side, p in zip(cells, self.patch, strict=True))

    def places(self, grid: tuple[int, ...] | None, spec: Spec, width: int) -> Places | None:
        """What positions add to the tokens; ``grid`` in cells, None takes the spec's."""
        if self.switches.positions == "none":
            return None
        cells = tuple(grid or spec.grid)
        tokens = tuple(side // p for side, p in zip(cells, self.patch, strict=True))
        return Places(self.switches.positions, width, tokens)

    def times(self, u: Tensor) -> Tensor:
        """Levels u as the weights are fed them, float32 at least."""
        u = u if u.dtype == torch.float64 else u.float()
        if self.timesteps is None:
            return 1 - u if self.flip else u
        t = u * self.timesteps - 1
        # float32 levels miss the steps by 1e-4, which short periods would notice
        return torch.where((t - t.round()).abs() < _NEAR, t.round(), t)

    def conditioning(self, x: Tensor, u: Tensor | None, condition: Any) -> tuple[Tensor, Tensor]:
        """Embedded time and embedded time plus condition, (R or 1, 1, D): one row where nothing differs by row."""
        if u is None:
            raise ValueError(
                "generator.path: this generator needs a noise level; name a path, such as linear"
            )
        if u.shape not in {(len(x),), (1,)}:
            raise ValueError(f"u: ({len(x)},) or (1,) is wanted, not {tuple(u.shape)}")
        time: Tensor = self.time(self.times(u))[:, None].to(x.dtype)  # (R or 1, D) -> (R or 1, 1, D)
        if self.condition is None:
            if condition is not None:
                raise ValueError("condition: this generator was built without one; give None")
            return time, time
        if condition is None:
            raise ValueError(
                "condition: this generator is conditioned; give the null class or zeros for none"
            )
        return time, time + self.condition(condition)[:, None].to(x.dtype)

    def outputs(
        self, tokens: Tensor, c: Tensor, grid: tuple[int, ...], want: frozenset[str]
    ) -> dict[str, Tensor]:
        """``prediction`` and ``variance`` (R, C, *cells), as far as they are wanted."""
        found = {}
        both = "variance" in want
        y = self.final(tokens, c, self.values * (2 if both else 1)).to(tokens.dtype)
        y = _cells(y, grid, self.patch)  # (R, N, C * P) -> (R, C, *cells), C twice with a variance
        if "prediction" in want:
            prediction = y[:, : self.channels]
            turned = self.flip and self.predicts == "velocity"  # dx/du = -dx/dt
            found["prediction"] = -prediction if turned else prediction
        if both:
            found["variance"] = y[:, self.channels :]
        return found

    def levels(self, want: frozenset[str], others: Mapping[str, int]) -> dict[str, int]:
        """The block after which each wanted output is known.

        Args:
            want: outputs.
            others: outputs besides ``hidden:k``, with their blocks.

        Raises:
            LookupError: an output is none that this generator gives.
        """
        ends = {"prediction": self.depth, **others}
        if self.switches.variance:
            ends["variance"] = self.depth
        levels = {}
        for output in want:
            name, _, block = output.partition(":")
            if output in ends:
                levels[output] = ends[output]
            elif name == "hidden" and block.isdecimal() and 1 <= int(block) <= self.depth:
                levels[output] = int(block)
            else:
                known = {*ends, f"hidden:{self.depth}"}
                raise LookupError(
                    f"the generator has no output {output!r}{suggestion(output, known)}; hidden:k goes "
                    f"from 1 to {self.depth}"
                )
        return levels


def activated(c: Tensor, times: int = 1) -> Tensor:
    """SiLU, once or more."""
    for _ in range(times):
        c = F.silu(c)
    return c


def _cells(y: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """Tokens (R, N, C * P) to (R, C, *cells)."""
    axes = len(grid)
    y = y.unflatten(1, grid).unflatten(-1, (-1, *patch))  # -> (R, *grid, C, *patch)
    order = [place for axis in range(axes) for place in (1 + axis, 2 + axes + axis)]
    y = y.permute(0, 1 + axes, *order)  # -> (R, C, h, p, w, q)
    return y.reshape(*y.shape[:2], *(side * p for side, p in zip(grid, patch, strict=True)))
