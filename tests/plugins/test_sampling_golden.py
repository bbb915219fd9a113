"""Sampling of the public implementations, step by step where they stored their states, from their own draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_core.samplers.ddpm import DDIM, DDPM
from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.ode import Dopri5, Euler, Heun
from vtp_core.samplers.reuse import Reuse
from vtp_core.samplers.sde import EulerMaruyama
from vtp_dit import DDT, DiT, DiTDH, LightningDiT, SiT, importers
from vtp_flow import DDPM as Discrete
from vtp_flow import GVP, VP, Linear
from vtp_plugins import Spec

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = Spec()
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Given(StepClock):
    """Draws are those given by name."""

    draws: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, *shape: int) -> Tensor:
        assert self.draws[name].shape == shape
        return self.draws[name]


class Seen(Field):
    """Notes the states that it is asked at."""

    def start(self, steps: int) -> None:
        self.states: list[Tensor] = []
        super().start(steps)

    def predict(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> dict[str, Tensor]:
        self.states.append(x)
        return super().predict(x, u, condition, at)


def given(noise: Tensor, steps: Tensor | None = None) -> Given:
    """The noise a sampling starts from and those of its steps."""
    later = {} if steps is None else {f"step{index}": draw[: len(noise)] for index, draw in enumerate(steps)}
    return Given(draws={"noise": noise, **later})


def stored(system: str, name: str) -> Stored:
    path = GOLDEN / system / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return load_file(path)


def network(
    cls: type[nn.Module], family: importers.Family, system: str, name: str = "weights", **known: Any
) -> nn.Module:
    """Our generator with the reference's weights."""
    options, tensors = family.to_ours(stored(system, name), **known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these widths are narrow on purpose
        made = cls(family.spec_of(tensors, options), **options)
    made.load_state_dict(tensors)
    return made.eval()


def null_of(classes: int) -> Callable[[Tensor], Tensor]:
    return lambda condition: torch.full_like(condition, classes)


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def worst(field: Seen, last: Tensor, theirs: Tensor) -> float:
    """The largest distance of a whole trajectory; of theirs, the conditioned rows."""
    ours = torch.stack([*field.states, last])
    assert len(ours) == len(theirs)
    return off(ours, theirs[:, : len(last)])


# ---- SiT


@pytest.fixture(scope="module")
def sit() -> tuple[nn.Module, Stored]:
    return network(SiT, importers.SIT, "sit", heads=4), stored("sit", "samplers")


SIT = {"guidance": Guidance(scale=1.5, channels=3), "null": null_of(8)}
ENDS: dict[Any, float] = {Linear: 0.0, GVP: 0.0, VP: 1e-3}


@pytest.mark.parametrize("path", ENDS)
def test_sits_ordinary_equation(sit: tuple[nn.Module, Stored], path: Any) -> None:
    net, of = sit
    z, y, key, end = of["in.z"][:2], of["in.y"][:2], f"out.ode.{path.__name__}", ENDS[path]
    field = Seen(net, path(SPEC), **SIT)
    x = Euler(SPEC, steps=5, end=end)(field, z.shape, y, given(z))
    if path is Linear:
        assert worst(field, x, of[f"{key}.euler.trajectory"]) < 5e-5
    else:
        assert off(x, of[f"{key}.euler.last"][:2]) < 5e-5
    assert field.evaluations == of[f"{key}.euler.nfe"]
    field = Seen(net, path(SPEC), **SIT)
    x = Heun(SPEC, steps=5, end=end)(field, z.shape, y, given(z))
    assert off(x, of[f"{key}.heun2.last"][:2]) < 2e-5
    assert field.evaluations == of[f"{key}.heun2.nfe"]
    field = Seen(net, path(SPEC))
    x = Dopri5(SPEC, end=end)(field, z.shape, y, given(z))
    assert off(x, of[f"{key}.dopri5.trajectory"][-1]) < 1e-2
    assert field.evaluations == of[f"{key}.dopri5.nfe"]


@pytest.mark.parametrize("predicts", ["noise", "score"])
def test_the_same_network_read_as_another_prediction(sit: tuple[nn.Module, Stored], predicts: Any) -> None:
    net, of = sit
    z, y = of["in.z"][:2], of["in.y"][:2]
    field = Field(_negated(net), Linear(SPEC, predicts=predicts))
    x = Euler(SPEC, steps=5, start=0.999, end=0.001)(field, z.shape, y, given(z))
    assert off(x, of[f"out.ode.Linear.{predicts}.euler.last"]) < 5e-2


@pytest.mark.parametrize(
    ("path", "last"),
    [(Linear, "Mean"), (Linear, "Tweedie"), (Linear, "Euler"), (Linear, "None"), (GVP, "Mean"), (VP, "Mean")],
)
def test_sits_stochastic_equation(sit: tuple[nn.Module, Stored], path: Any, last: str) -> None:
    net, of = sit
    z, key = of["in.z"][:2], f"out.sde.{path.__name__}.{last}"
    field = Seen(net, path(SPEC), **SIT)
    options: dict[str, Any] = {"last": last.lower(), "steps": 6 if last == "None" else 7}
    x = EulerMaruyama(SPEC, **options)(field, z.shape, of["in.y"][:2], given(z, of["in.sde_noise"]))
    if f"{key}.trajectory" in of:
        field.states = field.states[1:]
        assert worst(field, x, of[f"{key}.trajectory"]) < 5e-5
    else:
        assert off(x, of[f"{key}.last"][:2]) < 5e-5
    # one evaluation where theirs takes one for the drift and one for the score
    alone = 1 if last in {"Tweedie", "Euler"} else 0
    assert 2 * field.evaluations - alone == of[f"{key}.nfe"]


def test_sits_other_stochastic_samplers(sit: tuple[nn.Module, Stored]) -> None:
    net, of = sit
    z, y = of["in.z"][:2], of["in.y"][:2]
    sampler = EulerMaruyama(SPEC, steps=5, method="heun")
    x = sampler(Field(net, Linear(SPEC), **SIT), z.shape, y, given(z, of["in.heun_noise"]))
    assert off(x, of["out.sde.Linear.heun.last"][:2]) < 5e-5
    sampler = EulerMaruyama(SPEC, steps=7, diffusion="sbdm", start=0.999)
    field = Field(_negated(net), Linear(SPEC, predicts="score"), **SIT)
    x = sampler(field, z.shape, y, given(z, of["in.sde_noise"]))
    assert off(x, of["out.sde.Linear.score_model.SBDM.last"][:2]) < 1e-1


def _negated(net: nn.Module) -> Any:
    """``flip`` turns a velocity's sign; noise and score have the same sign in both directions of time."""

    def call(x: Tensor, u: Tensor, condition: Tensor, *rest: Any) -> dict[str, Tensor]:
        return {name: -value for name, value in net(x, u, condition, *rest).items()}

    return call


@pytest.mark.parametrize(
    ("diffusion", "theirs"),
    [
        ("constant", "constant"),
        ("sbdm", "SBDM"),
        ("sigma", "sigma"),
        ("linear", "linear"),
        ("decreasing", "decreasing"),
        ("inc-dec", "inccreasing-decreasing"),
    ],
)
@pytest.mark.parametrize("path", ENDS)
def test_sits_diffusions(path: Any, diffusion: Any, theirs: str) -> None:
    of = stored("sit", "paths")
    found = EulerMaruyama(SPEC, diffusion=diffusion).diffusion(path(SPEC), 1 - of["in.t"].double(), 0.6)
    assert off(found, of[f"out.{path.__name__}.diffusion.{theirs}"]) < 5e-5


# ---- REPA


def test_repas_samplers() -> None:
    net, of = network(SiT, importers.REPA, "repa_e", "weights_sit", heads=3), stored("repa_e", "sampling")
    z, y = of["in.z"], of["in.y"]
    guided = Guidance(scale=1.8, interval=(0.0, 0.7))

    def sampled(sampler: Any, guidance: Guidance | None = guided) -> tuple[Tensor, int]:
        made = Field(net, Linear(SPEC), guidance=guidance, null=null_of(1000))
        x = sampler(made, z.shape, y, given(z.double(), of["in.em_noise"]))
        assert x.dtype == torch.float64
        return x, made.evaluations

    x, evaluations = sampled(Euler(SPEC, steps=6))
    assert off(x, of["out.euler"]) < 5e-5 and evaluations == 6
    x, evaluations = sampled(Euler(SPEC, steps=6), None)
    assert off(x, of["out.euler_unguided"]) < 5e-5 and evaluations == 6
    x, evaluations = sampled(Heun(SPEC, steps=6, last="euler"))
    assert off(x, of["out.heun"]) < 5e-5 and evaluations == 11
    x, evaluations = sampled(EulerMaruyama(SPEC, steps=6))
    assert off(x, of["out.euler_maruyama"]) < 5e-5 and evaluations == 6


# ---- DiT


@pytest.fixture(scope="module")
def dit() -> tuple[nn.Module, Stored]:
    return network(DiT, importers.DIT, "dit", heads=4), stored("dit", "sampling")


def test_dits_ancestral_loop(dit: tuple[nn.Module, Stored]) -> None:
    net, of = dit
    z, y = of["in.loop_x"][:3], of["in.loop_y"][:3]
    field = Seen(net, Discrete(SPEC), guidance=Guidance(scale=1.5, channels=3), null=null_of(10))
    x = DDPM(SPEC, steps=10)(field, z.shape, y, given(z, of["in.loop_noise"]))
    field.states = field.states[1:]
    assert worst(field, x, of["out.p_loop.trajectory"]) < 2e-2
    assert field.evaluations == 10


@pytest.mark.parametrize(("eta", "key"), [(0.0, "eta0"), (0.5, "eta")])
def test_dits_ddim_loop(dit: tuple[nn.Module, Stored], eta: float, key: str) -> None:
    net, of = dit
    z, y = of["in.ddim_x"], of["in.ddim_y"]
    field = Seen(net, Discrete(SPEC))
    x = DDIM(SPEC, steps=10, eta=eta)(field, z.shape, y, given(z, of["in.ddim_noise"]))
    field.states = field.states[1:]
    assert worst(field, x, of[f"out.ddim_loop_{key}.trajectory"]) < 5e-3
    assert field.evaluations == 10


@pytest.mark.parametrize(("clip", "key", "limit"), [(None, "sample", 5e-5), (1.0, "sample_clipped", 2e-5)])
def test_one_ancestral_step(
    dit: tuple[nn.Module, Stored], clip: float | None, key: str, limit: float
) -> None:
    """Every row of theirs is at another step; each is entered through a chain that begins there."""
    net, of = dit
    path = Discrete(SPEC)
    for row, index in enumerate(of["in.p_index"].tolist()):
        made, place = Seen(net, _From(path, index)), slice(row, row + 1)
        draws = given(of["in.p_x"][place], of["in.p_noise"][None, place].expand(25, -1, -1, -1, -1))
        x = DDPM(SPEC, steps=25, clip=clip)(made, (1, 4, 8, 8), of["in.p_y"][place], draws)
        after = made.states[1] if index else x
        assert off(after, of[f"out.p_step.{key}"][place]) < limit


class _From:
    """A discrete path whose chains end at a step."""

    def __init__(self, path: Discrete, index: int) -> None:
        self.path, self.index, self.convert = path, index, path.convert

    def respaced(self, steps: int, spacing: Any) -> Any:
        chain = self.path.respaced(steps, spacing)
        chain.times = chain.times[: self.index + 1]
        return chain


# ---- LightningDiT


def test_lightningdits_shifted_and_guided_sampling() -> None:
    net = network(LightningDiT, importers.LIGHTNINGDIT, "lightningdit", "weights_base")
    of = stored("lightningdit", "sampling")
    z, y = of["in.z"][:2], of["in.y"][:2]
    guidance = Guidance(scale=6.7, interval=(0.0, 0.875), channels=3)
    for s, limits in ((0.3, (1e-4, 2e-5)), (0.075, (2e-4, 5e-5))):
        sampler = Euler(SPEC, steps=9, shift=1 / s)
        field = Seen(net, Linear(SPEC), guidance=guidance, null=null_of(10))
        x = sampler(field, z.shape, y, given(z))
        assert worst(field, x, of[f"out.euler.cfg_interval.shift{s}.trajectory"]) < limits[0]
        assert field.evaluations == of[f"out.euler.shift{s}.nfe"]
        field = Seen(net, Linear(SPEC))
        x = sampler(field, z.shape, y, given(z))
        assert worst(field, x, of[f"out.euler.plain.shift{s}.trajectory"]) < limits[1]
    field = Seen(net, Linear(SPEC))
    x = Dopri5(SPEC)(field, z.shape, y, given(z))
    assert off(x, of["out.dopri5.plain.last"]) < 2e-4
    assert field.evaluations == of["out.dopri5.nfe"]


# ---- DDT


@pytest.fixture(scope="module")
def ddt() -> tuple[nn.Module, Stored]:
    return network(DDT, importers.DDT, "ddt", encoder_blocks=3), stored("ddt", "sampling")


@pytest.mark.parametrize(("channels", "key"), [("all", "simple"), (3, "c3")])
@pytest.mark.parametrize(("refresh", "keep"), [(0, 8), (1, 3)])
def test_ddts_reuse(ddt: tuple[nn.Module, Stored], channels: Any, key: str, refresh: int, keep: int) -> None:
    net, of = ddt
    guidance = Guidance(scale=2.0, interval=(0.0, 0.7), edges="open", channels=channels)
    field = Seen(net, Linear(SPEC), guidance=guidance, null=null_of(9), reuse=Reuse(keep=keep))
    sampler = Euler(SPEC, steps=8, shift=2.5, last_step=0.04)
    x = sampler(field, of["in.noise"].shape, of["in.cond"], given(of["in.noise"]))
    key = f"out.euler.{key}.refresh{refresh}"
    assert worst(field, x, of[f"{key}.trajectory"]) < 1e-4
    assert field.refreshes == of[f"{key}.encoder_calls"] and field.evaluations == 8


@pytest.mark.parametrize(("norm", "key"), [(1.0, "sde"), (0.5, "sde_preserve")])
def test_ddts_stochastic_sampling(ddt: tuple[nn.Module, Stored], norm: float, key: str) -> None:
    """Guided but at t = 0; ``sde_preserve`` halves the diffusion of all steps but the last."""
    net, of = ddt
    theirs, y, shape = of[f"out.euler.{key}.trajectory"], of["in.cond"], of["in.noise"].shape

    def field() -> Seen:
        guidance = Guidance(scale=2.0, interval=(0.0, 1.0), edges="open")
        return Seen(net, Linear(SPEC), guidance=guidance, null=null_of(9))

    before = field()
    x = EulerMaruyama(SPEC, steps=8, norm=norm)(before, shape, y, given(of["in.noise"], of["in.sde_noise"]))
    if norm != 1:
        last = EulerMaruyama(SPEC, steps=1, start=0.04)
        x = last(field(), shape, y, given(before.states[-1]))
    assert worst(before, x, theirs) < 1e-4


# ---- DiT-DH


def test_rae_sampling_with_both_guidances() -> None:
    net, weak = (network(DiTDH, importers.DIT_DH, "dit_dh", name) for name in ("weights", "weights_guide"))
    of = stored("dit_dh", "sampling")
    z, y, shift = of["in.z"][:3], of["in.y"][:3], (49152 / 4096) ** 0.5
    sampler = Euler(SPEC, steps=7, shift=shift, end=0.001)
    ways: list[tuple[str, float, dict[str, Any]]] = [
        ("plain", 5e-5, {}),
        ("cfg", 1e-4, {"guidance": Guidance(scale=2.5, interval=(0.2, 0.8)), "null": null_of(9)}),
        ("autoguidance", 5e-5, {"guidance": Guidance(scale=1.42, use="auto"), "weak": weak}),
    ]
    for key, limit, joined in ways:
        field = Seen(net, Linear(SPEC), **joined)
        x = sampler(field, z.shape, y, given(z))
        assert worst(field, x, of[f"out.euler.{key}.trajectory"]) < limit
        assert field.evaluations == of["out.euler.nfe"]
    x = Dopri5(SPEC, end=0.001)(Field(net, Linear(SPEC)), z.shape, y, given(z))
    assert off(x, of["out.dopri5.last"]) < 1e-1


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_rae_stochastic_sampling(method: Any) -> None:
    """Theirs does not shift the last step, which ours does: it is a sampling of its own here."""
    net, of = network(DiTDH, importers.DIT_DH, "dit_dh"), stored("dit_dh", "sampling")
    z, y, shift = of["in.z"][:3], of["in.y"][:3], (49152 / 4096) ** 0.5
    theirs = of[f"out.sde.{method}.trajectory"]
    sampler = EulerMaruyama(SPEC, steps=5, shift=shift, end=0.04, last="none", method=method)
    before = sampler(Field(net, Linear(SPEC)), z.shape, y, given(z, of["in.sde_noise"]))
    assert off(before, theirs[-2]) < 5e-5
    last = EulerMaruyama(SPEC, steps=1, start=0.04)
    assert off(last(Field(net, Linear(SPEC)), z.shape, y, given(before)), theirs[-1]) < 5e-5
