"""Clocks and outputs for tests: everything an objective may ask of the engine, made from random numbers."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec

T = TypeVar("T")


def stream(*parts: object) -> torch.Generator:
    """A generator of its own for every name."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, parts)).encode()))


class Meeting:
    """Where processes that are threads leave tensors for each other; their graphs join.

    Args:
        world: processes.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.used = False
        self._barrier = threading.Barrier(world, timeout=60)
        self._left: list[Any] = [None] * world

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        """What every process brought, in their order."""
        self._left[rank] = x
        self._barrier.wait()
        everyone = list(self._left)
        self._barrier.wait()
        return everyone

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work(rank)`` of all processes at once."""

        def one(rank: int) -> T:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()  # nobody waits for one that failed
                raise

        with ThreadPoolExecutor(self.world) as pool:
            tasks = [pool.submit(one, rank) for rank in range(self.world)]
            errors = [error for task in tasks if (error := task.exception()) is not None]
            first = next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), None)
            if errors:
                raise first or errors[0]
            return [task.result() for task in tasks]


@dataclass(frozen=True)
class FakeClock:
    """The clock of one process at one step; draws are made for the whole batch and dealt.

    The backward of the mean of all processes' losses gives what averaged gradients give.
    """

    step: int = 3
    steps: int = 100
    rank: int = 0
    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    micro: int = 0
    micros: int = 1

    @property
    def share(self) -> float:
        return self.step / self.steps

    @property
    def world(self) -> int:
        return self.meeting.world

    def positions(self, rows: int) -> Tensor:
        return self.rank + self.world * (self.micro + self.micros * torch.arange(rows))

    def normal(self, name: str, *shape: int) -> Tensor:
        whole = torch.randn(shape[0] * self.world * self.micros, *shape[1:], generator=self.rng(name))
        return whole[self.positions(shape[0])]

    def uniform(self, name: str, *shape: int) -> Tensor:
        whole = torch.rand(shape[0] * self.world * self.micros, *shape[1:], generator=self.rng(name))
        return whole[self.positions(shape[0])]

    def rng(self, name: str) -> torch.Generator:
        return stream(self.step, name)

    def gather(self, x: Tensor) -> Tensor:
        self.meeting.used = True
        return torch.cat(self.meeting.exchange(self.rank, x))  # (R, ...) -> (W*R, ...)

    def total(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)


RAW: dict[str, Callable[[int, Spec], Any]] = {
    "text": lambda i, spec: ("a red circle", "two blue squares", "nothing", "a dog")[i % 4],
    "label": lambda i, spec: torch.tensor(i % max(spec.classes, 2)),
}
"""Raw values by field; a field that is not here is a signal of the modality."""

FED = frozenset({"clean", "noise", "noised", "target", "u"})
"""What a generator is fed, or aims at; no gradient is asked of it."""


class Noted(dict[str, Any]):
    """Values that remember which of them were read."""

    def __init__(self, values: Mapping[str, Any], read: Callable[[str], None]) -> None:
        super().__init__(values)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        self._read(name)
        return super().__getitem__(name)


class FakeBatch:
    """Outputs for the needs of an objective over one global batch.

    Args:
        objective: whose needs, views and masks are served.
        spec: shapes.
        rows: R of the whole batch.
        dtype: of fractions.
        uneven: masks hide ten times as many places of every even row as of every odd one.
    """

    def __init__(
        self,
        objective: Objective,
        spec: Spec,
        rows: int = 8,
        dtype: torch.dtype = torch.float32,
        uneven: bool = False,
    ) -> None:
        self.objective, self.spec, self.rows, self.dtype = objective, spec, rows, dtype
        self.uneven = uneven
        self.read: set[tuple[str, str]] = set()
        self.leaves: dict[tuple[str, ...], Tensor] = {}
        self._inputs: dict[str, Any] = {}
        self._masks: dict[str, Tensor] = {}

    def got(self, clock: FakeClock) -> dict[str, Outputs]:
        """What the process of ``clock`` is handed for its micro-batch.

        Global row i belongs to process i mod W, and there to micro-batch (i div W) mod A.
        """
        own = slice(clock.rank + clock.world * clock.micro, None, clock.world * clock.micros)
        return {slot: self._outputs(slot, need, own) for slot, need in self.objective.needs.items()}

    def _outputs(self, slot: str, need: Need, own: slice) -> Outputs:
        values = {
            output: self._dealt(self._whole(need, output), need, output, own) for output in sorted(need.want)
        }
        named = [output.partition("@")[2] for output in sorted(need.want) if "@" in output]
        named += [need.mask] if need.mask not in {None, "any"} else []
        mask = self.mask(named[0])[:, own] if named else None
        return Outputs(
            Noted(values, lambda output: self.read.add((slot, output))), mask, self._grid(need.view)
        )

    def _dealt(self, value: Any, need: Need, output: str, own: slice) -> Any:
        if output == "input" and self._crops(need.view) is None:
            return value[own]
        if isinstance(value, tuple):
            return tuple(part[:, own] for part in value)
        name = output.partition("@")[2]
        return value[:, own][self.mask(name)[:, own]] if name else value[:, own]

    # ---- views and masks

    def input(self, view: str) -> Any:
        """A view of every row: (K, R, ch, *size), (R, ...) without crops, or the raw values."""
        if view not in self._inputs:
            made = self.objective.views.get(view)
            raw = [self._raw(view if made is None else made.field, i) for i in range(self.rows)]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(view.encode()))
                values = raw if made is None else [made(value) for value in raw]
            stacked: Any = torch.stack(values) if isinstance(values[0], Tensor) else values
            if made is None and self._crops(view):  # a view that somebody else brings
                stacked = stacked[None]  # (R, ...) -> (1, R, ...)
            elif made is not None and made.crops is not None:
                stacked = stacked.transpose(0, 1)  # (R, K, ...) -> (K, R, ...)
            self._inputs[view] = self._normalised(stacked)
        return self._inputs[view]

    def _raw(self, name: str, index: int) -> Any:
        if name in RAW:
            return RAW[name](index, self.spec)
        shape = (self.spec.signal_channels, *self.spec.size)
        if self.spec.modality == "image":
            return torch.randint(256, shape, generator=stream(name, index), dtype=torch.uint8)
        return torch.randn(shape, generator=stream(name, index))

    def _normalised(self, x: Any) -> Any:
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = x / 127.5 - 1
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def _crops(self, view: str) -> int | None:
        if view in self.objective.views:
            return self.objective.views[view].crops
        return None if view in RAW else 1

    def _grid(self, view: str) -> tuple[int, ...]:
        if view not in self.objective.views:
            return () if view in RAW else self.spec.grid
        if self._crops(view) is None:
            return ()
        return tuple(side // p for side, p in zip(self.input(view).shape[3:], self.spec.patch, strict=True))

    def mask(self, name: str) -> Tensor:
        """A sampler's mask of the whole batch, (K, R, N)."""
        if name not in self._masks:
            drawn = self.sampled(name, FakeClock(step=0))
            self._masks[name] = _uneven(drawn) if self.uneven else drawn
        return self._masks[name]

    def sampled(self, name: str, clock: FakeClock) -> Tensor:
        """What a sampler draws for one process."""
        sampler = self.objective.masks[name]
        crops, grid = self._crops(sampler.view) or 1, self._grid(sampler.view)
        return sampler(crops, self.rows // (clock.world * clock.micros), grid, clock)

    # ---- outputs

    def learning(self) -> dict[str, Tensor]:
        """Fake outputs that take gradient, by view, source and output."""
        return {" ".join(key): leaf for key, leaf in self.leaves.items() if leaf.requires_grad}

    def _whole(self, need: Need, output: str) -> Any:
        """An output over the whole batch, without crops cut or places picked."""
        base = output.partition("@")[0]
        if base == "input":
            return self.input(need.view)
        if base == "posterior":
            return self._leaf(need, "posterior.mean"), self._leaf(need, "posterior.log_variance")
        if base == "indices":
            shape = (self._crops(need.view) or 1, self.rows, math.prod(self._grid(need.view)))
            return torch.randint(7, shape, generator=stream(need.view, "indices"))
        return self._leaf(need, base)

    def _leaf(self, need: Need, base: str) -> Tensor:
        key = (need.view, need.source, base)
        if key not in self.leaves:
            crops = self._crops(need.view) or 1
            value = torch.randn(
                crops, self.rows, *self._shape(need, base), generator=stream(*key), dtype=torch.float64
            )
            if base == "u":
                value = torch.special.ndtr(value)  # levels lie in [0, 1]
            learns = need.source in {"student", "generator"} and base not in FED
            self.leaves[key] = value.to(self.dtype).requires_grad_(learns)
        return self.leaves[key]

    def _shape(self, need: Need, base: str) -> tuple[int, ...]:
        """Shape of an output beyond (K, R)."""
        grid, spec = self._grid(need.view), self.spec
        width = dict(spec.teachers).get(need.source.partition(":")[2], spec.width)
        if need.source == "generator" and base.startswith("hidden"):
            width = spec.generator_width
        shapes: dict[str, tuple[int, ...]] = {
            "cls": (width,),
            "latent.cls": (spec.channels,),
            "decoded": (spec.signal_channels, *(g * p for g, p in zip(grid, spec.patch, strict=True))),
            "u": (),
            **dict.fromkeys(("prediction", "variance", *FED - {"u"}), (spec.channels, *grid)),
        }
        latent = base.startswith(("latent", "posterior"))
        return shapes.get(base, (math.prod(grid), spec.channels if latent else width))


def _uneven(mask: Tensor) -> Tensor:
    """A mask (K, R, N) of the same shape: ten places of every even row, or most of few, and one of every odd."""
    crops, rows, places = mask.shape
    ranks = torch.rand(crops, rows, places, generator=stream("uneven")).argsort(-1).argsort(-1)
    counts = torch.where(torch.arange(rows) % 2 == 0, max(1, min(10, places - 1)), 1)
    return ranks < counts[:, None]
