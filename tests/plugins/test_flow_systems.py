"""Paths, loss and generators together: the training losses and gradients of the public systems."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtp_core.clock import StepClock
from vtp_dit import DDT, DiT, DiTDH, LightningDiT, SiT
from vtp_dit import importers as of
from vtp_flow import DDPM, GVP, VP, Flow, Linear
from vtp_plugins import Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden"
CLOCK = StepClock()
PATHS = {"Linear": Linear, "GVP": GVP, "VP": VP}
Stored = dict[str, Tensor]


def generator(cls: Any, family: of.Family, weights: str, **known: Any) -> nn.Module:
    """Ours with the reference's weights."""
    options, tensors = family.to_ours(load_file(GOLDEN / f"{weights}.safetensors"), **known)
    net: nn.Module = cls(family.spec_of(tensors, options), **options)
    net.load_state_dict(tensors)
    return net.eval()


def losses(
    net: nn.Module, path: Any, data: Tensor, noise: Tensor, u: Tensor, labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """What the engine does in a step, by row: (R,) of each term."""
    flow = Flow(Spec(path=path), **options)
    noised = path.mix(data, noise, u)
    got = {"clean": data, "noise": noise, "u": u, "noised": noised, "target": path.target(data, noise, u)}
    got |= net(noised, u, labels, want=flow.needs["flow"].want & {"prediction", "variance"})
    rows = [{name: value[i : i + 1][None] for name, value in got.items()} for i in range(len(u))]
    found = [flow({"flow": Outputs(row)}, CLOCK) for row in rows]
    return {term: torch.stack([one[term] for one in found]) for term in found[0]}


def norm(net: nn.Module, loss: Tensor) -> Tensor:
    """Of the gradient at all parameters."""
    loss.backward()
    return torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()


def off(ours: Tensor, stored: Tensor) -> float:
    return float((ours.detach().double() - stored.double()).abs().max())


@pytest.mark.parametrize("name", PATHS)
def test_every_loss_equals_sits(name: str) -> None:
    stored = load_file(GOLDEN / "sit" / "losses.safetensors")
    data, noise, u = stored["in.x1"], stored["in.x0"], 1 - stored["in.t"]
    net = generator(SiT, of.SIT, "sit/weights", heads=4)
    most = {"none": 5e-5, "velocity": 1e-3, "likelihood": 1e-4}
    for predicts in ("velocity", "noise", "score"):
        net.flip = predicts == "velocity"  # type: ignore[assignment]
        path = PATHS[name](Spec(), predicts=predicts)  # type: ignore[arg-type]
        for weighting in ("none",) if predicts == "velocity" else tuple(most):
            fed = Reversed(net) if predicts != "velocity" else net
            with torch.no_grad():
                ours = losses(fed, path, data, noise, u, stored["in.y"], weighting=weighting)["mse"]
            theirs = stored[f"out.{name}.{predicts}.{weighting.replace('none', 'None')}.loss"]
            assert off(ours, theirs) <= most[weighting]


class Reversed(nn.Module):
    """A network whose time runs from noise to data, and which predicts what has no direction."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, u: Tensor, condition: Any, want: frozenset[str]) -> Any:
        return self.net(x, 1 - u, condition, want=want)


def test_the_gradient_equals_sits() -> None:
    stored = load_file(GOLDEN / "sit" / "losses.safetensors")
    net = generator(SiT, of.SIT, "sit/weights", heads=4)
    data, noise, u = stored["in.x1"], stored["in.x0"], 1 - stored["in.t"]
    loss = losses(net, Linear(Spec()), data, noise, u, stored["in.y"])["mse"].mean()
    assert off(norm(net, loss), stored["out.Linear.velocity.grad_total_norm"]) <= 2e-5


@pytest.mark.parametrize("variant", ["base", "lnmlp"])
def test_the_gradient_equals_lightningdits(variant: str) -> None:
    stored = load_file(GOLDEN / "lightningdit" / "loss.safetensors")
    net = generator(LightningDiT, of.LIGHTNINGDIT, f"lightningdit/weights_{variant}", heads=4)
    data, noise, u = stored["in.x1"], stored["in.x0"], 1 - stored["in.t"]
    found = losses(net, Linear(Spec()), data, noise, u, stored["in.y"], cosine=1.0)
    loss = found["mse"].mean() + found["cosine"].mean()
    assert off(loss, stored[f"out.{variant}.total"]) <= 1e-5
    assert off(norm(net, loss), stored[f"out.{variant}.grad_total_norm"]) <= 2e-5


def test_the_loss_equals_ddts() -> None:
    stored = load_file(GOLDEN / "ddt" / "loss.safetensors")
    net = generator(DDT, of.DDT, "ddt/weights", heads=4, encoder_blocks=3, patch=2)
    data, noise, u = stored["in.x"], stored["in.noise"], 1 - stored["out.t"]
    with torch.no_grad():
        found = losses(net, Linear(Spec()), data, noise, u, stored["in.y"])
    assert off(found["mse"].mean(), stored["out.fm_loss"]) <= 1e-5


def test_the_gradient_equals_raes() -> None:
    stored = load_file(GOLDEN / "dit_dh" / "loss.safetensors")
    net = generator(DiTDH, of.DIT_DH, "dit_dh/weights", heads=2, head_heads=4)
    data, noise, u = stored["in.x1"], stored["in.x0"], stored["in.t"]
    loss = losses(net, Linear(Spec()), data, noise, u, stored["in.y"])["mse"]
    assert off(loss, stored["out.loss"]) <= 2e-5
    assert off(norm(net, loss.mean()), stored["out.grad_total_norm"]) <= 1e-5


def test_the_gradient_equals_dits() -> None:
    stored = load_file(GOLDEN / "dit" / "diffusion.safetensors")
    net = generator(DiT, of.DIT, "dit/weights", heads=4)
    data, noise = stored["in.x_start"], stored["in.noise"]
    u = ((stored["in.t"] + 1) / 1000).float()
    found = losses(net, DDPM(Spec()), data, noise, u, stored["in.y"], vlb=1.0)
    assert off(found["vlb"], stored["out.loss.vb"]) <= 2e-5
    loss = found["mse"] + found["vlb"]
    assert off(loss, stored["out.loss.loss"]) <= 1e-5
    assert off(norm(net, loss.mean()), stored["out.grad.loss.total_norm"]) <= 1e-5
