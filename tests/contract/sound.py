"""Objectives that keep the contract, and classes that break it in one place each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import AdversarialObjective, Objective
from vtp_plugins.spec import Spec

Got = Mapping[str, Outputs]


@dataclass(frozen=True)
class View:
    field: str = "image"
    crops: int | None = 2

    def __call__(self, value: Any) -> Tensor:
        return torch.stack([value, value.flip(-1)]) + torch.randint(3, ()).to(value)


@dataclass(frozen=True)
class Mask:
    view: str = "global"

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        return (clock.uniform("mask", rows, crops, grid[0] * grid[1]) < 0.4).transpose(0, 1)


class Sound(Objective):
    """Everything an objective may have, done well; the broken ones differ in one thing."""

    shadow: ClassVar[tuple[str, ...]] = ("head",)
    exports: ClassVar[tuple[str, ...]] = ("score",)
    centre: Tensor

    def __init__(self, spec: Spec, *, on: str = "patches") -> None:
        super().__init__()
        self.head, self.on = nn.Linear(spec.width_of(on), 5), f"{on}@mask"
        self.views, self.masks = {"global": View()}, {"mask": Mask()}
        self.needs = {
            "student": Need("global", self.on, mask="mask"),
            "teacher": Need("global", self.on, source="ema", mask=None),
        }
        self.register_buffer("centre", torch.zeros(5))

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        scores = wide(self.ema("head")(got["teacher"][self.on])).detach()
        for name, value in {"sum": scores.sum(0), "count": torch.tensor(float(len(scores)))}.items():
            self.pending[name] = self.pending.get(name, 0) + value
        each = (wide(self.head(got["student"][self.on])) - (scores - self.centre)).square().mean(-1)  # (M,)
        each = each * (1 + 0.1 * clock.normal("scale", 4)[0].to(each) * 0)
        return {"match": self.mean(each, got["student"], clock)}

    def mean(self, each: Tensor, student: Outputs, clock: Clock) -> Tensor:
        """Every crop weighs one, however many of its places are masked."""
        mask = student.mask
        assert mask is not None
        share = (mask / mask.sum(-1, keepdim=True).clamp(min=1))[mask]  # (M,)
        return (each * share).sum() / mask[..., 0].numel()

    def settle(self, clock: Clock) -> None:
        self.centre.lerp_(
            (clock.total(self.pending["sum"]) / clock.total(self.pending["count"])).to(self.centre), 0.1
        )
        super().settle(clock)

    def score(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x)
        return scores


class Counting(Sound):
    """Every masked place weighs one: a row's weight depends on how many the others have."""

    coupled = True

    def mean(self, each: Tensor, student: Outputs, clock: Clock) -> Tensor:
        return each.sum() * clock.world / clock.total(torch.tensor(float(len(each))))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Rows(Objective):
    """A base for objectives that read `cls` of one view."""

    want = "cls"

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.needs = {"x": Need("image", self.want)}
        self.layer = nn.Linear(spec.width, 3)

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"loss": self.loss(wide(got["x"]["cls"]), clock)}

    def loss(self, x: Tensor, clock: Clock) -> Tensor:
        return wide(self.layer(x)).square().mean()


class Fool(AdversarialObjective):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.critic = nn.Linear(spec.width, 1)
        self.needs = {"x": Need("image", "cls")}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"fool": wide(self.critic(got["x"]["cls"])).mean()}

    def critique(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"real": wide(self.critic(got["x"]["cls"])).square().mean()}


def broken(name: str, base: type[Objective] = Rows, **members: Any) -> type[Objective]:
    return type(name, (base,), members)


def built(name: str, change: Any, base: type[Objective] = Sound) -> type[Objective]:
    """A class whose constructor ends in `change(self)`."""

    def init(self: Any, spec: Spec) -> None:
        base.__init__(self, spec)  # type: ignore[call-arg]
        change(self)

    return type(name, (base,), {"__init__": init})


def keep(self: Any, got: Got, clock: Clock) -> dict[str, Tensor]:
    self.layer.weight.data += 1
    return {"loss": wide(self.layer(wide(got["x"]["cls"]))).mean()}


def hoard(self: Any, got: Got, clock: Clock) -> dict[str, Tensor]:
    loss = wide(self.layer(wide(got["x"]["cls"]))).mean()
    self.pending["loss"] = loss
    return {"loss": loss}


class Plain(Rows):
    """Its centre is a plain attribute."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.level: Any = torch.zeros(())

    def loss(self, x: Tensor, clock: Clock) -> Tensor:
        for name, value in {"sum": x.detach().sum(), "count": torch.tensor(x.numel())}.items():
            self.pending[name] = self.pending.get(name, 0) + value
        return self.layer(x).square().mean() + self.level

    def settle(self, clock: Clock) -> None:
        self.level = self.level + clock.total(self.pending["sum"]) / clock.total(self.pending["count"])
        super().settle(clock)


class Number(Plain):
    """Its centre is a number."""

    def settle(self, clock: Clock) -> None:
        self.level = float(self.level) + 1.0
        Objective.settle(self, clock)


class Steps(Fool):
    """Its critic's level moves with every call, of which there are more with micro-batches."""

    def critique(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        self.pending["calls"] = self.pending.get("calls", torch.zeros(())) + 1
        return {"real": (wide(self.critic(got["x"]["cls"])) * self.pending["calls"]).square().mean()}


class Last(Sound):
    """Forgets all micro-batches but the last."""

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        self.pending.clear()
        return super().forward(got, clock)


class Unsaved(Rows):
    """Its centre is a buffer that is not saved."""

    level: Tensor

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.register_buffer("level", torch.zeros(()), persistent=False)

    def settle(self, clock: Clock) -> None:
        self.level += 1
        super().settle(clock)


class Local(Plain):
    """Merges what this process has."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        del self.level
        self.register_buffer("level", torch.zeros(()))

    def settle(self, clock: Clock) -> None:
        self.level += (self.pending["sum"] / self.pending["count"]).to(self.level)
        Objective.settle(self, clock)


def unlike(x: Tensor) -> Tensor:
    """Depends on the whole batch."""
    return (x.flatten(0, 1) - x.flatten(0, 1).mean(0)).square().mean()
