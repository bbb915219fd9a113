"""Objectives of a few lines, one for every pattern that a system of the family needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from toys import Denoiser, Patches, Plane, Rounded, Some, Straight, Teacher, Unpatch, Wave, Whole, WholeView

from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import AdversarialObjective, Objective
from vtp_plugins.spec import Spec

Got = Mapping[str, Outputs]


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Read(Objective):
    """The mean squared distance of any output from `aim`: a need with all its options in the stack."""

    def __init__(
        self,
        spec: Spec,
        *,
        want: str = "cls",
        view: str = "image",
        crops: int | None = 1,
        source: str = "student",
        mask: str | None = None,
        drop: float | None = None,
        mode: str = "train",
        through: tuple[str, ...] = (),
        cut: tuple[str, ...] = (),
        draw: str = "main",
        aim: float = 0.3,
        sampler: str | None = None,
    ) -> None:
        super().__init__()
        self.want, self.aim = want, aim
        self.views = {view: Whole(crops=crops)}
        if sampler:
            self.masks = {sampler: Some(view)}
        self.needs = {"x": Need(view, want, source, mask, drop, mode, through, cut, draw)}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"distance": (wide(got["x"][self.want]) - self.aim).square().mean()}


class Rebuild(Objective):
    """Squared distance of decoded and input, in two terms."""

    def __init__(self, spec: Spec, *, view: str = "image", crops: int | None = 1) -> None:
        super().__init__()
        self.views = {view: Whole(crops=crops)}
        self.needs = {"x": Need(view, {"decoded", "input"}, mask=None)}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        off = wide(got["x"]["decoded"]) - wide(got["x"]["input"])
        return {"l2": off.square().mean(), "l1": off.abs().mean()}


class Head(nn.Linear):
    """A head that several objectives share."""

    def __init__(self, spec: Spec, *, prototypes: int = 7) -> None:
        super().__init__(spec.width, prototypes)


class Distil(Objective):
    """DINO-like: the student's `on` against the EMA teacher's, through a head, with a moving centre."""

    shadow = ("head",)

    def __init__(self, spec: Spec, *, on: str = "cls", head: nn.Module | None = None, crops: int = 2) -> None:
        super().__init__()
        self.on, self.head = on, head or Head(spec)
        self.views = {"global": Whole(crops=crops)}
        self.needs = {"student": Need("global", on), "teacher": Need("global", on, source="ema", mask=None)}
        self.register_buffer("centre", torch.zeros(7))

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        scores = wide(self.ema("head")(got["teacher"][self.on])).detach()
        target = (scores - self.centre).softmax(-1)
        for name, value in {
            "sum": wide(scores.flatten(0, -2)).sum(0),
            "count": torch.tensor(scores[..., 0].numel()),
        }.items():
            self.pending[name] = self.pending.get(name, 0) + value
        return {"match": -(target * wide(self.head(got["student"][self.on])).log_softmax(-1)).sum(-1).mean()}

    def settle(self, clock: Clock) -> None:
        mean = clock.total(self.pending["sum"]) / clock.total(self.pending["count"])
        self.centre.lerp_(mean, 0.1)
        super().settle(clock)


class Masked(Objective):
    """iBOT-like: the same at masked places, whose number varies by row and process, and so couples rows."""

    shadow, coupled = ("head",), True

    def __init__(
        self, spec: Spec, *, head: nn.Module | None = None, crops: int = 2, on: str = "patches"
    ) -> None:
        super().__init__()
        self.head, self.on = head or Head(spec), f"{on}@some"
        self.views, self.masks = {"global": Whole(crops=crops)}, {"some": Some("global")}
        self.needs = {
            "student": Need("global", self.on, mask="some"),
            "teacher": Need("global", self.on, source="ema", mask=None),
        }

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        target = wide(self.ema("head")(got["teacher"][self.on])).detach().softmax(-1)
        each = -(target * wide(self.head(got["student"][self.on])).log_softmax(-1)).sum(-1)  # (M,)
        count = clock.total(torch.tensor(float(len(each)), dtype=each.dtype))
        return {"match": each.sum() * clock.world / count}


class Contrast(Objective):
    """CLIP-like and KoLeo-like: couples all rows of all processes."""

    coupled = True

    def __init__(
        self, spec: Spec, *, on: str = "cls", view: str = "global", crops: int = 2, draws: bool = False
    ) -> None:
        super().__init__()
        self.on, self.draws = on, draws
        self.scale = nn.Parameter(torch.ones(()))
        self.views = {view: Whole(crops=crops)}
        self.needs = {"x": Need(view, on)}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        x = wide(got["x"][self.on]).transpose(0, 1).flatten(1)  # (K, R, D) -> (R, K D)
        if self.draws:
            x = x + 0.1 * clock.normal("noise", *x.shape).to(x)
        everyone = clock.gather(x)
        scores = wide(self.scale * (x[:, None] * everyone).sum(-1))  # (R, W R)
        own = scores.diagonal(clock.rank * len(x))
        return {"pairs": (scores.logsumexp(1) - own).mean()}


class Flow(Objective):
    """The generator's loss; its latent is cut."""

    def __init__(
        self, spec: Spec, *, cut: tuple[str, ...] = ("latent",), draw: str = "main", view: str = "image"
    ) -> None:
        super().__init__()
        self.views = {view: Whole()}
        self.needs = {"x": Need(view, {"prediction", "target"}, "generator", None, cut=cut, draw=draw)}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"drift": (wide(got["x"]["prediction"]) - wide(got["x"]["target"])).square().mean()}


class Align(Objective):
    """Hidden features of the generator against a teacher's (REPA); with `through`, for the tokenizer."""

    def __init__(
        self,
        spec: Spec,
        *,
        to: str = "judge",
        through: tuple[str, ...] = (),
        cut: tuple[str, ...] = ("latent",),
        mode: str = "train",
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.projector = projector or nn.Linear(spec.generator_width, dict(spec.teachers)[to])
        self.views = {"image": Whole()}
        self.needs = {
            "x": Need("image", "hidden:1", "generator", None, mode=mode, through=through, cut=cut),
            "to": Need("image", "patches", f"teacher:{to}", None),
        }

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {
            "align": (wide(self.projector(got["x"]["hidden:1"])) - wide(got["to"]["patches"])).square().mean()
        }


class Fool(AdversarialObjective):
    """A least-squares critic on pixels, with a frozen part of its own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        size = spec.signal_channels * spec.size[0] * spec.size[-1]
        self.critic = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, 1))
        self.critic[0].bias.requires_grad_(False)
        self.views = {"image": Whole()}
        self.needs = {"x": Need("image", {"decoded", "input"}, mask=None)}

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        return {"fool": (wide(self.critic(got["x"]["decoded"].flatten(2))) - 1).square().mean()}

    def critique(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        real, fake = (wide(self.critic(got["x"][name].flatten(2))) for name in ("input", "decoded"))
        return {"real": (real - 1).square().mean(), "fake": fake.square().mean()}


class Sick(Objective):
    """Fine until `at`, then its loss, or only its gradient, is not finite."""

    def __init__(self, spec: Spec, *, at: int = 2, gradient: bool = False) -> None:
        super().__init__()
        self.at, self.gradient = at, gradient
        self.views, self.needs = {"image": Whole()}, {"x": Need("image", "cls", mask=None)}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
        self.pending["count"] = torch.ones(())
        value = wide(got["x"]["cls"]).square().mean()
        if clock.step == self.at:
            value = (
                (value * 0).sqrt() if self.gradient else value * torch.nan
            )  # d sqrt(0) is infinite, times 0
        return {"sick": value}

    def settle(self, clock: Clock) -> None:
        self.seen += self.pending["count"]
        super().settle(clock)


PLUGINS = {
    "modalities": {"plane": Plane, "wave": Wave},
    "encoders": {"patches": Patches},
    "decoders": {"unpatch": Unpatch},
    "bottlenecks": {"rounded": Rounded},
    "teachers": {"judge": Teacher},
    "paths": {"straight": Straight},
    "generators": {"denoiser": Denoiser},
    "views": {"whole": WholeView},
    "modules": {"head": Head},
    "objectives": {
        "read": Read, "rebuild": Rebuild, "distil": Distil, "masked": Masked, "contrast": Contrast,
        "drift": Flow, "repa": Align, "fool": Fool, "sick": Sick,
    },
}  # fmt: skip
