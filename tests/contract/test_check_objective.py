"""The test kit finds every way to break the contract, and says what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sound import (
    Counting,
    Fool,
    Got,
    Last,
    Local,
    Mask,
    Number,
    Plain,
    Rows,
    Sound,
    Steps,
    Unsaved,
    broken,
    built,
    hoard,
    keep,
    unlike,
    wide,
)
from torch import Tensor, nn

from vtp_plugins.clock import Clock
from vtp_plugins.errors import PluginFault
from vtp_plugins.fakes import FakeClock
from vtp_plugins.needs import Need
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec
from vtp_plugins.testing import SPEC, check_objective


def test_sound_objectives_pass() -> None:
    state = torch.get_rng_state()
    check_objective(Sound)
    check_objective(Sound, on="latent")
    check_objective(Sound, Spec(size=(16, 24), patch=(4, 4), width=8, channels=2))
    check_objective(Counting)
    check_objective(Rows)
    check_objective(Fool)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_kind_of_output_can_be_faked() -> None:
    wants = {
        "student": ["cls", "patches", "hidden:2", "latent", "latent.cls", "decoded", "decoder.hidden:1"],
        "generator": ["prediction", "target", "hidden:3", "noised", "u"],
        "teacher:lite0": ["cls", "patches"],
        "ema": ["cls"],
    }  # fmt: skip

    class Everything(Objective):
        def __init__(self, spec: Spec) -> None:
            super().__init__()
            self.needs = {source: Need("image", want, source) for source, want in wants.items()}
            self.needs |= {name: Need(name, "input") for name in ("image", "text", "label")}
            self.needs["codes"] = Need("image", {"indices", "posterior"})

        def forward(self, got: Got, clock: Clock) -> dict[str, Tensor]:
            rows = 8 // (clock.world * clock.micros)  # type: ignore[attr-defined]
            assert got["label"]["input"].shape == (rows,)
            assert len(got["text"]["input"]) == rows
            assert got["teacher:lite0"]["patches"].shape[-1] == 6
            assert got["generator"]["hidden:3"].shape[-1] == 12
            assert got["student"]["decoded"].shape == got["image"]["input"].shape
            assert got["student"].grid == (4, 4)
            mean, log_variance = got["codes"]["posterior"]
            assert got["codes"]["indices"].shape == mean.shape[:-1]
            parts = [wide(got[source][w]).square().mean() for source, want in wants.items() for w in want]
            return {"all": torch.stack([*parts, wide(mean).mean(), wide(log_variance).mean()]).sum()}

    check_objective(Everything)


BROKEN: list[tuple[Any, str]] = [
    (lambda spec: nn.Linear(1, 1), "is a Linear; derive it from vtp_plugins.Objective"),
    (built("NoNeeds", lambda o: setattr(o, "needs", {})), "needs is {}; set self.needs"),
    (
        built("NoViewField", lambda o: o.views.update(other=print)),
        "views['other'] must be callable with a str attribute 'field'",
    ),
    (
        built(
            "Identity",
            lambda o: o.views.update(v=type("V", (), {"field": "image", "crops": 1, "__call__": abs})()),
        ),
        "differs between equal builds; make it a frozen dataclass",
    ),
    (
        built("NoMask", lambda o: o.masks.clear()),
        "names mask 'mask'; bring its sampler in self.masks['mask']",
    ),
    (broken("NoShadow", Sound, shadow=("haed",)), "shadow names 'haed', which is no submodule"),
    (
        broken("NoExport", Sound, exports=("scor",)),
        "exports names 'scor', which is neither a method nor a module",
    ),
    (broken("Coupled", coupled="yes"), "coupled is 'yes'; it is True or False"),
    (
        broken("Bare", forward=lambda self, got, clock: got["x"]["cls"].mean()),
        "forward returns Tensor; return a dict of scalars",
    ),
    (broken("Empty", forward=lambda self, got, clock: {}), "return a dict of scalars by term, one at least"),
    (
        broken("Vector", forward=lambda self, got, clock: {"a": got["x"]["cls"]}),
        "term 'a' is no scalar tensor",
    ),
    (broken("Infinite", loss=lambda self, x, clock: x.sum() / 0), "is inf on random outputs"),
    (
        broken("Half", forward=lambda self, got, clock: {"a": got["x"]["cls"].mean()}),
        "is torch.bfloat16 from torch.bfloat16 outputs; compute it in torch.float32",
    ),
    (
        broken("Narrow", loss=lambda self, x, clock: x.float().mean()),
        "is torch.float32 from torch.float64 outputs; compute it in torch.float64",
    ),
    (
        broken("Undeclared", forward=lambda self, got, clock: {"a": got["y"]["cls"].mean()}),
        "forward reads 'y', which self.needs does not name",
    ),
    (broken("Unread", want={"cls", "patches"}), "need 'x' wants 'patches', which forward never reads"),
    (
        broken("Global", loss=lambda self, x, clock: (x * torch.rand(())).mean()),
        "uses a global random generator",
    ),
    (broken("Impure", forward=keep), "forward changes 'layer.weight'; put what changes in self.pending"),
    (broken("Hoard", forward=hoard), "pending['loss'] holds a graph; detach it"),
    (
        broken("Detached", loss=lambda self, x, clock: x.detach().mean()),
        "no gradient reaches a parameter or an output",
    ),
    (
        broken("Root", loss=lambda self, x, clock: (x - x.detach()).abs().sum().sqrt()),
        "is not finite on random outputs",
    ),
    (
        broken("Unsettled", Sound, settle=lambda self, clock: None),
        "settle leaves ['count', 'sum'] in pending; end it with super().settle(clock)",
    ),
    (Last, "'centre' settles differently over two micro-batches; add to pending, don't replace"),
    (Plain, "settle changes 'level', which state_dict() leaves out; register_buffer it"),
    (Number, "differs after state_dict() and load_state_dict(); register its state"),
    (Unsaved, "settle changes 'level', which state_dict() leaves out"),
    (Local, "'level' settles differently on two processes; merge clock.total() of pending"),
    (
        broken("Sum", loss=lambda self, x, clock: x.square().sum()),
        "does not average to that of one; return a scalar whose mean over processes",
    ),
    (
        broken("Batch", loss=lambda self, x, clock: unlike(x)),
        "of two processes does not average to that of one",
    ),
    (
        broken("Gathers", loss=lambda self, x, clock: unlike(clock.gather(x.transpose(0, 1)))),
        "forward gathers rows, so the loss couples them; set self.coupled = True",
    ),
    (
        broken("Pairs", Counting, coupled=False),
        "term 'match' of four micro-batches does not average to that of one; return a mean over rows; where "
        "rows weigh by what the others have, as by a count that varies, set self.coupled = True",
    ),
    (
        broken("Own", Counting, mean=lambda self, each, student, clock: each.mean()),
        "term 'match' of two processes does not average to that of one",
    ),
    (
        broken("Pair", loss=lambda self, x, clock: x.square().mean() * (1 + (clock.world > 2))),
        "term 'loss' of four processes does not average to that of one",
    ),
    (Steps, "term 'critic_real' of four micro-batches does not average to that of one"),
    (
        broken(
            "CriticSum",
            Fool,
            critique=lambda self, got, clock: {"real": wide(self.critic(got["x"]["cls"])).square().sum()},
        ),
        "term 'critic_real' of two processes does not average to that of one",
    ),
    (
        broken(
            "HalfGradient",
            coupled=True,
            loss=lambda self, x, clock: (
                unlike(clock.gather(x.transpose(0, 1)).detach()) + unlike(x) - unlike(x).detach()
            ),
        ),
        "the gradient of image student cls on two processes is not that on one",
    ),
    (
        broken(
            "Idle",
            Fool,
            critique=lambda self, got, clock: {
                "a": wide(got["x"]["cls"]).mean() + 0 * self.critic.weight.sum()
            },
        ),
        "critique gives its critic no gradient",
    ),
]


@pytest.mark.parametrize(("cls", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_objective_is_told_what_to_mend(cls: Any, message: str) -> None:
    with pytest.raises(PluginFault) as caught:
        check_objective(cls)
    assert message in str(caught.value)
    assert str(caught.value).startswith(getattr(cls, "__name__", ""))
    assert caught.value.code == 3


def test_a_mask_that_is_drawn_for_one_process_is_found() -> None:
    @dataclass(frozen=True)
    class Own(Mask):
        def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
            return torch.rand(crops, rows, grid[0] * grid[1], generator=clock.rng("mask")) < 0.4

    with pytest.raises(PluginFault, match="mask 'mask' of two processes is not that of one, dealt"):
        check_objective(built("Own", lambda o: o.masks.update(mask=Own())))


def test_the_fake_clock_keeps_the_contract() -> None:
    assert isinstance(FakeClock(), Clock)
    assert SPEC.grid == (4, 4)
