"""Components that go wrong in one process of several, named on the command line with ``--plugin``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtp_core.data.order import permutation
from vtp_core.data.views import Plain
from vtp_core.peers import PULSE
from vtp_plugins import Clock, Need, Objective, Outputs, Spec
from vtp_plugins.hookspecs import hookimpl


def _lookup() -> None:
    raise KeyError("codebook")


def _sleep() -> None:
    time.sleep(1000)


def _kill_once() -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


WAYS: dict[str, Callable[[], None]] = {
    "lookup": _lookup,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill once": _kill_once,
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": _sleep,
    "memory": lambda: torch.empty(10**15) and None,
}


def befall(way: str, rank: int) -> None:
    if int(os.environ.get("RANK", "0")) == rank:
        WAYS[way]()


class Mishap(Objective):
    """Goes wrong in one process, in the step that follows ``at`` steps; or its loss or gradient is no number."""

    def __init__(self, spec: Spec, *, way: str, at: int = 2, rank: int = 1) -> None:
        super().__init__()
        self.needs, self.views = {"x": Need("image", "cls")}, {"image": Plain(spec)}
        self.way, self.at, self.rank = way, at, rank

    def forward(self, got: dict[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        size = got["x"]["cls"].float().square().mean()
        if clock.step != self.at:
            return {"size": size}
        mine = clock.rank == self.rank
        if self.way == "loss":
            return {"size": size * (torch.nan if mine else 1.0)}
        if self.way == "gradient":
            return {
                "size": size + (got["x"]["cls"].float().flatten()[0] * (0 if mine else 1)).square().sqrt()
            }
        befall(self.way, self.rank)
        return {"size": size}


class Heavy(Objective):
    """Makes each checkpoint take a quarter of a minute in the process that writes it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.needs, self.views = {"x": Need("image", "cls")}, {"image": Plain(spec)}
        self.register_state_dict_pre_hook(self._written)

    def forward(self, got: dict[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        return {"size": got["x"]["cls"].float().square().mean()}

    def _written(self, *_: Any) -> None:
        if PULSE.doing.startswith("saving") and os.environ.get("RANK") == "0":
            time.sleep(15)


class Hook:
    """Goes wrong in one process after a step."""

    def __init__(self, spec: Spec, *, way: str, at: int = 2, rank: int = 1) -> None:
        self.way, self.at, self.rank = way, at, rank

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Clock, metrics: Mapping[str, float]) -> None:
        if metrics["step"] + 1 != self.at:
            return
        if self.way == "drift":
            weight = next(engine.model.encoder.parameters())
            weight.data.view(-1)[0] += clock.rank
        else:
            befall(self.way, self.rank)


class Probe:
    """Goes wrong in one process while it measures; or takes its time, ``pause`` seconds a batch."""

    fields: frozenset[str] = frozenset()

    def __init__(
        self, spec: Spec, *, way: str = "slow", rank: int = 1, rounds: int = 100, pause: float = 0.1
    ) -> None:
        self.way, self.rank, self.rounds, self.pause = way, rank, rounds, pause

    def __call__(self, tokenizer: Any, bench: Any) -> list[Any]:
        if self.way != "slow":
            befall(self.way, self.rank)
            return []
        for _ in range(self.rounds):
            time.sleep(self.pause)
            next(iter(bench.images(bench.splits[0])))
        return []


class Slides:
    """Pictures of one colour; in one process the samples of a later step hang or cannot be read."""

    fields = frozenset({"image", "name"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train",)
    names: Mapping[str, Sequence[str]] = {}

    def __init__(
        self, spec: Spec, split: str = "train", *, way: str = "", rank: int = 1, after: int = 20
    ) -> None:
        self.way, self.rank, self.after, self.reads = way, rank, after, 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        if self.way and self.reads > self.after:
            befall(self.way, self.rank)
        value = torch.full((3, 40, 40), 6 * index, dtype=torch.uint8)
        return {"image": value, "name": f"slide {index}"}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        return "slides"


class Cards:
    """Forty noisy pictures with captions and labels: an epoch is two and a half batches of sixteen."""

    fields = frozenset({"image", "text", "label"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train",)
    names: Mapping[str, Sequence[str]] = {"label": [str(label) for label in range(5)]}

    def __init__(self, spec: Spec, split: str = "train") -> None: ...

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(index)
        value = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=draws)
        return {"image": value, "text": f"card number {index}", "label": index % 5}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        return "cards"


PLUGINS = {
    "objectives": {"mishap": Mishap, "heavy": Heavy},
    "hooks": {"mishap": Hook},
    "probes": {"mishap": Probe},
    "datasets": {"slides": Slides, "cards": Cards},
}
