"""Modules that cost next to nothing, and VTP's step on them by hand: what else a step takes is the engine's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_plugins import Clock, Need, Objective, Outputs, Spec, hookimpl

ROWS = {"image": 8, "global": 4, "local": 4}


class Dot(nn.Module):
    """An encoder of one number per token."""

    width, depth, patch, size = 1, 1, (4, 4), (8, 8)

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(
        self, x: Tensor, *, select: Mapping[str, Tensor] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        tokens = (x[:, 0, ::4, ::4] * self.scale).flatten(1).unsqueeze(2)  # (B, ch, H, W) -> (B, N, 1)
        found = {"cls": tokens[:, 0], "patches": tokens}
        return found | {f"patches@{n}": tokens.flatten(0, 1)[at] for n, at in (select or {}).items()}


class Dots(nn.Module):
    """Its decoder."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"decoded": z * self.scale}


@dataclass(frozen=True)
class Crops:
    """A view of K crops."""

    crops: int
    field: str = "image"

    def __call__(self, value: Any) -> Tensor:
        return torch.zeros(self.crops, 3, 8, 8, dtype=torch.uint8)


@dataclass(frozen=True)
class Half:
    """Hides every second patch."""

    view: str = "global"

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        return (torch.arange(math.prod(grid)) % 2 == 1).expand(crops, rows, -1)


class Mean(Objective):
    """The mean of everything read: one need ``[view, output, source]`` a slot."""

    def __init__(self, spec: Spec, *, reads: dict[str, tuple[str, str, str]]) -> None:
        super().__init__()
        self.needs = {
            slot: Need(view, out, source, None if source == "ema" else "any")
            for slot, (view, out, source) in reads.items()
        }
        self.outputs = {slot: out for slot, (_, out, _) in reads.items()}
        self.views = {
            view: Crops({"image": 1, "global": 2, "local": 4}[view]) for view, _, _ in reads.values()
        }
        self.masks = {"block": Half()} if any("@" in out for out in self.outputs.values()) else {}

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        return {"mean": torch.stack([got[slot][out].mean() for slot, out in self.outputs.items()]).sum()}


class Watch:
    """A hook plugin that does nothing, at every place a step has."""

    @hookimpl(wrapper=True)
    def vtp_encode(self, call: Any, x: Any) -> Any:
        return (yield)

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Any, metrics: Any) -> None: ...


PLUGINS = {"encoders": {"dot": Dot}, "decoders": {"dots": Dots}, "objectives": {"mean": Mean}}
STUDENT, TEACHER = ["global", "cls", "student"], ["global", "cls", "ema"]
PATCHES = {source: ["global", "patches@block", source] for source in ("student", "ema")}
READS = {
    "clip": {"image": ["image", "cls", "student"]},
    "dino": {"student": STUDENT, "teacher": TEACHER, "local": ["local", "cls", "student"]},
    "ibot": PATCHES,
    "koleo": {"student": STUDENT},
    "reconstruction": {"image": ["image", "decoded", "student"]},
}
STACK: dict[str, Any] = {
    "data": {"use": "emoji", "batch_size": ROWS["image"]},
    "encoder": {"use": "dot"},
    "bottleneck": {"use": "linear", "channels": 1},
    "decoder": {"use": "dots"},
    "objectives": {
        n: {"use": "mean", "rows": 1.0 if n == "clip" else 0.5, "reads": r} for n, r in READS.items()
    },
}


def by_hand(engine: Engine, inputs: Inputs) -> Callable[[], None]:
    """The engine's step on its own modules, written out: the same forwards, losses, clipping and updates."""
    model, ema = engine.model, engine.ema
    encoder, decoder = cast(nn.Module, model.encoder), cast(nn.Module, model.decoder)
    chain, teacher = cast(nn.Module, model.bottleneck), ema.modules["encoder"]
    places = torch.arange(1, 2 * ROWS["global"] * 4, 2)
    adamw, parameters = engine.optimizers.optimizers["adamw"], engine.optimizers.parameters()

    def signal(view: str) -> Tensor:
        return cast(Tensor, model.modality.normalise(inputs.views[view].flatten(0, 1)))

    def step() -> None:
        image = encoder(signal("image"))
        z = chain(image["patches"][: ROWS["global"]])["latent"].transpose(1, 2).unflatten(2, (2, 2))
        first = image["cls"].mean() + decoder(z)["decoded"].mean()
        first.backward()
        crops = signal("global")
        student = encoder(crops, select={"block": places})
        with torch.no_grad():
            seen = teacher(crops, select={"block": places})
        parts = [student["cls"], seen["cls"], encoder(signal("local"))["cls"], student["cls"]]
        parts += [student["patches@block"], seen["patches@block"]]
        second = torch.stack([part.mean() for part in parts]).sum()
        second.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=True)
        torch.stack([first.detach(), second.detach(), norm]).tolist()
        adamw.step()
        adamw.zero_grad()
        ema.update(0.99)

    return step
