"""Block masks for iBOT, drawn as DINOv2 does (arXiv 2304.07193): rectangles until enough is hidden."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vtp_core.data.order import key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vtp_plugins.clock import Clock


@dataclass(frozen=True)
class Block:
    """Hides rectangles in a share of the crops; the hidden ratios are stratified over the whole global batch.

    Every crop draws from a stream keyed by its global row, so any number of processes sees the same masks.

    Args:
        view: view that is masked.
        probability: share of the crops that is masked.
        ratio: hidden share of the patches of a masked crop, low and high.
        smallest: least patches of a rectangle.
        largest: most patches of a rectangle, as a share of all.
        aspect: aspect of a rectangle, low and high.
        exact: fill up with single patches to the very target, as DINOv3 does.
        tries: rectangles drawn before one more is given up.
    """

    view: str
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    smallest: int = 4
    largest: float = 0.5
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    exact: bool = False
    tries: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"masks: probability lies in [0, 1], not {self.probability}")
        if not 0 < self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"masks: ratio is a range with 0 < low <= high < 1, not {self.ratio}")

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        """Masks of this process's rows, (K, R, N) bool on the CPU, True where hidden."""
        if len(grid) != 2:
            raise ValueError(f"masks: rectangles need a grid (h, w), not {grid}")
        places = clock.positions(max(rows, 2)).tolist()
        every = rows * (places[1] - places[0])  # rows of the whole global batch: neighbours lie W x A apart
        generator = clock.rng("block")
        targets = self.targets(crops * every, grid[0] * grid[1], generator)
        stream = int(torch.randint(2**62, (), generator=generator))
        masks = np.zeros((crops, rows, grid[0] * grid[1]), dtype=bool)
        for crop in range(crops):
            for row, place in enumerate(places[:rows]):
                number = crop * every + place
                if targets[number]:
                    masks[crop, row] = self.draw(targets[number], grid, key("block", stream, number))
        return torch.from_numpy(masks)

    def targets(self, count: int, patches: int, generator: torch.Generator) -> list[int]:
        """Patches to hide in each of ``count`` crops: a ratio out of each equal bin, shuffled."""
        masked = int(count * self.probability)
        low, high = self.ratio
        draws = (torch.arange(masked) + torch.rand(masked, generator=generator, dtype=torch.float64)) / max(
            masked, 1
        )
        hidden = (patches * (low + (high - low) * draws)).long()
        targets = torch.cat([hidden, hidden.new_zeros(count - masked)])
        chosen: list[int] = targets[torch.randperm(count, generator=generator)].tolist()
        return chosen

    def draw(self, target: int, grid: tuple[int, ...], stream: int) -> NDArray[np.bool_]:
        """One mask, (N,) bool, of ``target`` patches or a few less, from the stream of that number."""
        height, width = grid
        bits = np.random.Generator(np.random.Philox(key=stream))
        board, hidden = 0, 0  # a board is one integer with a bit per patch: rectangles meet by bitwise and
        while hidden < target:
            grown = self._grow(board, target - hidden, grid, iter(bits.random(4 * self.tries).tolist()))
            if grown == board:
                break
            board, hidden = grown, grown.bit_count()
        raw = board.to_bytes(-(-height * width // 8), "little")
        mask = np.unpackbits(np.frombuffer(raw, np.uint8), count=height * width, bitorder="little").astype(
            bool
        )
        if self.exact and hidden < target:
            free = np.flatnonzero(~mask)
            mask[bits.permutation(free)[: target - hidden]] = True
        return mask

    def _grow(self, board: int, room: int, grid: tuple[int, ...], draws: Iterator[float]) -> int:
        """The board with one more rectangle that hides at least one and at most ``room`` more patches."""
        height, width = grid
        most = min(room, self.largest * height * width)
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        for _ in range(self.tries):
            area = self.smallest + (most - self.smallest) * next(draws)
            aspect = math.exp(low + (high - low) * next(draws))
            down, right = next(draws), next(draws)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            place = int(down * (height - h + 1)) * width + int(right * (width - w + 1))
            block = rectangle(h, w, width) << place
            if 0 < (block & ~board).bit_count() <= most:
                return board | block
        return board


@lru_cache(maxsize=4096)
def rectangle(height: int, width: int, stride: int) -> int:
    """A rectangle in the first rows and columns of a board with ``stride`` columns."""
    row = (1 << width) - 1
    return sum(row << (i * stride) for i in range(height))
