"""Alignment: what its options mean, what they refuse, where gradient goes, and the engine around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtp_align import Align, Term
from vtp_align.maps import grid_of, normalised, resized
from vtp_align.projectors import Projector
from vtp_core.clock import StepClock
from vtp_core.components import resolve
from vtp_plugins import Outputs, Spec
from vtp_plugins.errors import StackFault
from vtp_plugins.registry import Registry
from vtp_plugins.testing import SPEC, check_objective

CLOCK = StepClock()
WIDE = Spec(
    size=(32, 32), patch=(8, 8), width=6, depth=4, channels=6, generator_width=6, teachers=(("lite0", 6),)
)


def got(objective: Align, x: Tensor, y: Tensor, grid: tuple[int, ...] = (4, 4)) -> dict[str, Outputs]:
    return {
        "student": Outputs({objective.on: x}, grid=grid),
        "teacher": Outputs({objective.target: y}, grid=grid),
    }


def align(spec: Spec = WIDE, **options: Any) -> Align:
    return Align(spec, to="lite0", **options)


def loss(objective: Align, x: Tensor, y: Tensor, grid: tuple[int, ...] = (4, 4)) -> Tensor:
    return torch.stack(list(objective(got(objective, x, y, grid), CLOCK).values())).sum()


def x_and_y(n: int = 16, m: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, n, 6).double().requires_grad_(), torch.randn(1, 3, m, 6).double()


# ---- the contract


@pytest.mark.parametrize(
    "options",
    [
        {"on": "hidden:2", "projector": "mlp3", "hidden": 8, "distance": "neg_cosine"},
        {"on": "hidden:2", "projector": "conv3x3", "normalise": "spatial"},
        {"on": "latent", "projector": "linear", "terms": {"a": Term(), "b": Term(scope="pairs", distance="l1")}},
        {"on": "latent", "scope": "pairs", "distance": "mse"},
        {"on": "latent", "scope": "batch", "distance": "smooth_l1"},
        {"on": "latent", "projector": "conv_mish", "hidden": 8, "side": "teacher"},
        {"on": "decoder.hidden:3", "of": "student", "projector": "mlp3", "hidden": 8},
        {"on": "cls", "target": "cls", "projector": "linear", "distance": "mse"},
        {"on": "latent.cls", "pooling": "mean", "projector": "linear", "scope": "batch", "distance": "l1"},
        {"on": "hidden:3", "pooling": "max", "projector": "mlp3", "hidden": 8, "through": ("generator",), "cut": ()},
        {"detach": "student", "projector": "linear"},
        {"of": "ema", "projector": "linear"},
    ],
)  # fmt: skip
def test_every_form_keeps_the_contract(options: dict[str, Any]) -> None:
    check_objective(Align, to="lite0", **options)


def test_two_processes_give_the_batch_wide_loss_of_one(ranks: Callable[..., list[Any]], off: Any) -> None:
    x, y = torch.randn(1, 6, 16, 6).double().requires_grad_(), torch.randn(1, 6, 16, 6).double()
    objective = align(scope="batch", distance="l1", margin=0.2)

    def share(clock: StepClock) -> Tensor:
        rows = slice(None) if clock.world == 1 else slice(clock.rank * 3, clock.rank * 3 + 3)
        return objective(got(objective, x[:, rows], y[:, rows]), clock)["l1"]

    alone, together = share(CLOCK), torch.stack(ranks(2, share)).mean()
    assert off(together, alone) < 1e-12
    assert off(torch.autograd.grad(together, x)[0], torch.autograd.grad(alone, x)[0]) < 1e-10


# ---- what it reads


def test_hidden_is_the_generators_where_there_is_one() -> None:
    need = align(on="hidden:2").needs["student"]
    assert (need.source, need.cut, need.mask) == ("generator", ("latent",), None)
    assert align(on="hidden:2", of="student").needs["student"].source == "student"
    assert align(Spec(width=6, teachers=(("lite0", 6),)), on="hidden:2").needs["student"].source == "student"
    assert align(on="latent").needs["student"].cut == ()
    assert align(target="hidden:3").needs["teacher"].want == {"hidden:3"}


def test_repa_e_trains_the_tokenizer_through_the_generator() -> None:
    shared = Projector(SPEC, to="lite0", on="hidden:2", hidden=8)
    own = Align(SPEC, to="lite0", on="hidden:2", head=shared)
    other = Align(SPEC, to="lite0", on="hidden:2", head=shared, cut=(), through=("generator",), mode="eval")
    assert own.head is other.head
    need = other.needs["student"]
    assert (need.cut, need.through, need.mode) == ((), ("generator",), "eval")


# ---- values


def test_distances_are_what_they_say() -> None:
    x, y = x_and_y()
    cosine = F.cosine_similarity(x, y, dim=-1)
    expected = {
        "cosine": 1 - cosine, "neg_cosine": -cosine, "mse": (x - y) ** 2, "l1": (x - y).abs(),
        "smooth_l1": F.smooth_l1_loss(x, y, reduction="none"),
    }  # fmt: skip
    for distance, value in expected.items():
        torch.testing.assert_close(loss(align(distance=distance), x, y), value.mean())
    torch.testing.assert_close(loss(align(margin=0.7), x, y), F.relu(0.3 - cosine).mean())


def test_pairs_stay_inside_a_picture_and_need_no_projector() -> None:
    x, y = torch.randn(1, 3, 16, 5).double(), torch.randn(1, 3, 16, 6).double()
    spec = Spec(size=(32, 32), patch=(8, 8), width=5, teachers=(("lite0", 6),))
    found = loss(align(spec, scope="pairs", distance="l1", margin=0.1), x, y)
    total = 0.0
    for b in range(3):
        for i in range(16):
            for j in range(16):
                pair = [F.cosine_similarity(z[0, b, i], z[0, b, j], dim=0) for z in (x, y)]
                total += max(float((pair[0] - pair[1]).abs()) - 0.1, 0)
    assert float(found) == pytest.approx(total / (3 * 16 * 16), rel=1e-9)


def test_spatial_normalisation_takes_mean_and_deviation_over_tokens_out() -> None:
    y = 3 + 2 * torch.randn(2, 16, 6).double()
    found = normalised(y, "spatial")
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.std(1), torch.ones(2, 6).double(), atol=1e-5, rtol=0)
    half = normalised(y, "spatial", 0.5)
    torch.testing.assert_close(half, (y - 0.5 * y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-6))


def test_token_normalisations() -> None:
    y = torch.randn(2, 16, 6).double() + 1
    torch.testing.assert_close(
        normalised(y, "rms").square().mean(-1), torch.ones(2, 16).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(normalised(y, "l2").norm(dim=-1), torch.ones(2, 16).double())
    torch.testing.assert_close(
        normalised(y, "layer").mean(-1), torch.zeros(2, 16).double(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_the_teachers_map_takes_the_students_grid_or_the_reverse(mode: Any) -> None:
    x, y = x_and_y(16, 64)
    maps = y[0].transpose(1, 2).unflatten(2, (8, 8))
    keys = {} if mode == "area" else {"align_corners": False}
    small = F.interpolate(maps, size=(4, 4), mode=mode, **keys).flatten(2).transpose(1, 2)
    torch.testing.assert_close(loss(align(resize=mode, distance="mse"), x, y), (x[0] - small).square().mean())
    large = resized(x[0], (4, 4), (8, 8), mode)
    found = loss(align(resize=mode, resize_side="student", distance="mse"), x, y)
    torch.testing.assert_close(found, (large - y[0]).square().mean())


def test_a_map_follows_the_views_aspect() -> None:
    assert grid_of(torch.zeros(1, 24, 2), (8, 12), "x") == (4, 6)
    assert grid_of(torch.zeros(1, 50, 2), (40,), "x") == (50,)
    with pytest.raises(StackFault, match="10 tokens are no grid shaped as 4 x 4"):
        grid_of(torch.zeros(1, 10, 2), (4, 4), "x")


def test_pooling_comes_before_the_projector() -> None:
    x, y = x_and_y()
    objective = align(projector="mlp3", hidden=8, pooling="mean").double()
    projected = objective.head(x[0].mean(1, keepdim=True), (1,))
    expected = (1 - F.cosine_similarity(projected, y[0].mean(1, keepdim=True), dim=-1)).mean()
    torch.testing.assert_close(loss(objective, x, y), expected)


def test_conv_projectors_see_the_grid() -> None:
    head = Projector(WIDE, to="lite0", on="latent", kind="conv3x3")
    x = torch.randn(2, 16, 6)
    expected = F.conv2d(
        x.transpose(1, 2).unflatten(2, (4, 4)), head.layers[0].weight, head.layers[0].bias, padding=1
    )
    torch.testing.assert_close(head(x, (4, 4)), expected.flatten(2).transpose(1, 2))


# ---- gradient


def test_gradient_reaches_the_student_and_the_projector_only() -> None:
    x, y = x_and_y()
    y.requires_grad_()
    objective = align(projector="linear", detach="teacher").double()
    loss(objective, x, y).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert objective.head.layers[0].weight.grad.abs().sum() > 0
    assert y.grad is None


def test_detach_keeps_gradient_from_a_side() -> None:
    x, y = x_and_y()
    objective = align(projector="linear", detach="student").double()
    loss(objective, x, y).backward()
    assert x.grad is None
    assert objective.head.layers[0].weight.grad.abs().sum() > 0
    still = align(projector="linear", side="teacher", detach="teacher").double()
    loss(still, x, y).backward()
    assert not any(parameter.requires_grad for parameter in still.parameters())
    assert x.grad is not None and x.grad.abs().sum() > 0


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "lite1"}, "to: no 'lite1' under 'teachers'; did you mean 'lite0'"),
        ({"on": "latent"}, "latent has 4 channels and teacher 'lite0' 6; set projector: linear or mlp3"),
        ({"on": "decoded"}, "on: 'decoded' is none of cls, patches"),
        ({"on": "patches@block"}, "is none of cls, patches"),
        ({"on": "latent", "of": "generator"}, "a generator gives hidden:k"),
        (
            {"on": "hidden:2", "of": "generator", "spec": Spec(width=6, teachers=(("lite0", 6),))},
            "no generator",
        ),
        ({"on": "decoder.hidden:2", "of": "ema"}, "ema has no decoder"),
        ({"on": "cls", "projector": "linear"}, "one vector against many tokens; set pooling: mean"),
        ({"distance": "neg_cosine", "margin": 0.1, "projector": "linear"}, "neg_cosine has none"),
        ({"scope": "pairs"}, "set distance to l1, mse or smooth_l1"),
        ({"scope": "pairs", "distance": "l1", "pooling": "mean"}, "there is one vector; use batch"),
        ({"normalise": "spatial", "pooling": "mean", "projector": "linear"}, "use layer, rms or l2"),
        ({"projector": "conv3x3", "pooling": "mean"}, "reads a map, but there is one vector"),
        ({"detach": "student", "scope": "pairs", "distance": "l1"}, "add a projector"),
        ({"of": "ema", "scope": "pairs", "distance": "l1"}, "add a projector"),
    ],
)
def test_what_means_nothing_is_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    written = {"to": "lite0", **options}
    with pytest.raises((ValueError, LookupError), match=message):
        Align(written.pop("spec", SPEC), **written)


def test_unequal_grids_are_named_both() -> None:
    x, y = x_and_y(16, 64)
    with pytest.raises(StackFault, match=r"16 tokens \(4 x 4\) and teacher 'lite0' 64 \(8 x 8\); set resize"):
        loss(align(), x, y)


def test_terms_are_written_in_yaml_and_checked() -> None:
    node = {
        "use": "align",
        "to": "lite0",
        "terms": {"mdms": {"scope": "pairs", "distance": "l1", "margin": 0.25}},
    }
    component = resolve(Registry(), "objectives", "objectives.vf", node, "tiny")
    assert component.build(WIDE).terms == {"mdms": Term(scope="pairs", distance="l1", margin=0.25)}
    node["terms"]["mdms"]["margins"] = 1  # type: ignore[index]
    with pytest.raises(StackFault, match=r"objectives\.vf\.terms\.mdms\.margins: unknown key"):
        resolve(Registry(), "objectives", "objectives.vf", node, "tiny")
