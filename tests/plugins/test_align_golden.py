"""Each paper's alignment, as the README's table writes it, against values of the published code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from vtp_align import Align
from vtp_core import balance
from vtp_core.clock import StepClock
from vtp_core.models.bottlenecks import RMSNorm
from vtp_core.options import Balance
from vtp_plugins import Outputs, Spec

GOLDEN = Path(__file__).parents[1] / "golden"
CLOCK = StepClock()
Off = Callable[[Tensor, Tensor], float]


def tokens(z: Tensor) -> Tensor:
    return z.flatten(2).transpose(1, 2)[None]  # (B, C, h, w) -> (1, B, N, C)


def losses(objective: Align, x: Tensor, y: Tensor, grid: tuple[int, ...] = ()) -> dict[str, Tensor]:
    given = {
        "student": Outputs({objective.on: x}, grid=grid),
        "teacher": Outputs({objective.target: y}, grid=grid),
    }
    return objective(given, CLOCK)


def aligned(width: int, teacher: int, **options: Any) -> Align:
    axes = options.pop("axes", 2)
    generator = width if str(options.get("on", "")).startswith("hidden") else 0
    spec = Spec(
        modality="image" if axes == 2 else "audio", size=(32,) * axes, patch=(8,) * axes, width=width,
        channels=width, teachers=(("t", teacher),), generator_width=generator,
    )  # fmt: skip
    return Align(spec, to="t", **options)


# ---- REPA


def sinusoids(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


def heads_apart(x: Tensor) -> Tensor:
    return x.unflatten(-1, (4, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D / heads)


def sit_hidden(w: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Tokens of REPA's SiT after its two encoder blocks, (B, 16, 32)."""

    def linear(name: str, v: Tensor) -> Tensor:
        return F.linear(v, w[f"{name}.weight"], w[f"{name}.bias"])

    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", sinusoids(t))))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for block in ("blocks.0", "blocks.1"):
        parts = linear(f"{block}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, 2)
        inner = F.layer_norm(h, (32,), eps=1e-6) * (1 + parts[1]) + parts[0]
        q, k, v = (heads_apart(part) for part in linear(f"{block}.attn.qkv", inner).chunk(3, 2))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + parts[2] * linear(f"{block}.attn.proj", mixed)
        inner = F.layer_norm(h, (32,), eps=1e-6) * (1 + parts[4]) + parts[3]
        inner = F.gelu(linear(f"{block}.mlp.fc1", inner), approximate="tanh")
        h = h + parts[5] * linear(f"{block}.mlp.fc2", inner)
    return h


def test_repas_projector_loss_and_gradients(off: Off) -> None:
    stored = load_file(GOLDEN / "repa_vavae" / "repa_sit.safetensors")
    weights = load_file(GOLDEN / "repa_vavae" / "repa_sit.weights.safetensors")
    weights = {key: value.requires_grad_(key != "pos_embed") for key, value in weights.items()}
    objective = aligned(32, 24, on="hidden:2", projector="mlp3", hidden=40, distance="neg_cosine")
    assert objective.needs["student"].source == "generator"
    head = {f"layers.{k.removeprefix('projectors.0.')}": v for k, v in weights.items() if "projectors" in k}
    objective.head.load_state_dict(head)

    hidden = sit_hidden(weights, stored["out.x_t"], stored["in.t"], stored["in.y"])
    assert off(objective.head(hidden, (4, 4)), stored["out.zs_tilde0"]) < 1e-5
    loss = losses(objective, hidden[None], stored["in.zs0"][None], (4, 4))["neg_cosine"]
    assert off(loss, stored["out.proj_loss"]) < 1e-5
    loss.backward()
    for name, parameter in objective.head.named_parameters():
        own = f"projectors.0.{name.removeprefix('layers.')}"
        assert parameter.grad is not None
        assert off(0.5 * parameter.grad, stored[f"grad.{own}"]) < 3e-5  # stored of the total, coefficient 0.5
    checked = 0
    for name, weight in weights.items():
        if weight.grad is not None and f"gradnorm_projonly.{name}" in stored:
            assert off(weight.grad.norm(), stored[f"gradnorm_projonly.{name}"]) < 3e-5, name
            checked += 1
    assert checked >= 20


def test_repas_gradient_at_the_projected_tokens(off: Off) -> None:
    stored = load_file(GOLDEN / "repa_vavae" / "repa_sit.safetensors")
    x = stored["out.zs_tilde0"][None].requires_grad_()
    loss = losses(aligned(24, 24, distance="neg_cosine"), x, stored["in.zs0"][None])["neg_cosine"]
    loss.backward()
    assert off(loss, stored["out.proj_loss_alone"]) < 1e-5
    assert off(x.grad, stored["grad.zs_tilde0"]) < 3e-5


# ---- VA-VAE


@pytest.mark.parametrize(
    ("case", "terms"),
    [
        ("both", {"mcos": ("cosine", 0.5, "token"), "mdms": ("l1", 0.25, "pairs")}),
        ("both_nomargin", {"mcos": ("cosine", 0.0, "token"), "mdms": ("l1", 0.0, "pairs")}),
        ("cos", {"mcos": ("cosine", 0.5, "token")}),
        ("distmat", {"mdms": ("l1", 0.25, "pairs")}),
    ],
)
def test_va_vaes_margin_losses_and_gradients(case: str, terms: dict[str, Any], off: Off) -> None:
    stored = load_file(GOLDEN / "repa_vavae" / "vf_loss.safetensors")
    z = stored["in.z_projected"].requires_grad_()
    keys = ("distance", "margin", "scope")
    written = {name: dict(zip(keys, term, strict=True)) for name, term in terms.items()}
    objective = aligned(24, 24, on="latent.sample", terms=written)
    found = losses(objective, tokens(z), tokens(stored["in.aux_feature"]), (4, 5))
    assert set(found) == set(terms)
    loss = torch.stack(list(found.values())).sum()
    (0.1 * loss).backward()
    assert off(loss, stored[f"out.{case}.vf_loss"]) < 1e-5
    assert off(z.grad, stored[f"grad.{case}.z_projected_of_total"]) < 3e-5


# ---- GAE


def gae(stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The adapter's weight and the latent that our bottleneck makes with it, (1, B, N, C)."""
    weight = stored["adapter.model.weight"].requires_grad_()
    latent = RMSNorm(Spec(channels=8))(tokens(stored["out.encoder_feature"]) @ weight.T)["latent"]
    return weight, latent


def test_gaes_squared_error_is_twice_the_cosine_distance(off: Off) -> None:
    stored = load_file(GOLDEN / "gae_unitok_gigatok" / "gae.safetensors")
    _, latent = gae(stored)
    assert off(latent, tokens(stored["out.latent_mean"])) < 1e-5
    target = tokens(stored["in.semantic_target"])
    squared = losses(aligned(8, 8, on="latent", distance="mse"), latent, target)["mse"]
    assert off(squared, stored["out.default.sp_loss"]) < 1e-5
    assert off(squared, stored["out.identity_mse"]) < 1e-5
    cosine = losses(aligned(8, 8, on="latent", distance="cosine"), latent, target)["cosine"]
    assert off(2 * cosine, stored["out.identity_2_minus_2cos"]) < 1e-5


def test_gaes_adaptive_weight_is_the_engines_balance(off: Off) -> None:
    """grad.default = nll + 0.5 g + sp, grad.before_start = nll + sp, grad.adaptive_sp = nll + 0.5 g + w sp."""
    stored = load_file(GOLDEN / "gae_unitok_gigatok" / "gae.safetensors")
    weight, latent = gae(stored)
    anchor = torch.nn.Parameter(weight.detach().clone())
    latent = RMSNorm(Spec(channels=8))(tokens(stored["out.encoder_feature"]) @ anchor.T)["latent"]
    loss = losses(aligned(8, 8, on="latent", distance="mse"), latent, tokens(stored["in.semantic_target"]))[
        "mse"
    ]
    (own,) = torch.autograd.grad(loss, anchor, retain_graph=True)
    grads = {
        name: stored[f"grad.{name}.adapter.model.weight"]
        for name in ("default", "before_start", "adaptive_sp")
    }
    share = stored["out.adaptive_sp.sp_weight"]
    assert off(own * (1 - share), grads["default"] - grads["adaptive_sp"]) < 1e-5
    nll = (anchor * (grads["before_start"] - own)).sum()  # a loss with the stored gradient
    found = balance.ratio(loss, nll, anchor, Balance(against="reconstruction", at="bottleneck.last", max=1e8))
    assert off(found, share) < 1e-5


def test_gaes_margin_variant(off: Off) -> None:
    stored = load_file(GOLDEN / "gae_unitok_gigatok" / "gae.safetensors")
    _, latent = gae(stored)
    terms = {
        "mcos": {"distance": "cosine", "margin": 0.5},
        "mdms": {"distance": "l1", "margin": 0.25, "scope": "pairs"},
    }
    found = losses(aligned(8, 8, on="latent", terms=terms), latent, tokens(stored["in.semantic_target"]))
    assert off(found["mcos"], stored["out.vf.sp_loss_cos"]) < 1e-5
    assert off(found["mdms"], stored["out.vf.sp_loss_distmat"]) < 1e-5


# ---- GigaTok


def test_gigatoks_decoder_alignment(off: Off) -> None:
    stored = load_file(GOLDEN / "gae_unitok_gigatok" / "gigatok_loss.safetensors")
    x = stored["in.inner_feat"][None].requires_grad_()
    objective = aligned(24, 24, on="decoder.hidden:3", distance="neg_cosine")
    loss = losses(objective, x, stored["in.teacher_feat"][None], (3, 3))["neg_cosine"]
    loss.backward()
    assert off(loss, stored["out.proj_loss"]) < 1e-5
    assert off(x.grad, stored["grad.proj_loss.inner_feat"]) < 1e-5


# ---- audio


def test_semantic_vaes_projector_on_the_teachers_side(off: Off) -> None:
    stored = load_file(GOLDEN / "audio" / "svae.safetensors")
    objective = aligned(
        8, 24, on="latent.sample", projector="conv_mish", hidden=16, side="teacher", resize="bilinear",
        distance="neg_cosine", axes=1,
    )  # fmt: skip
    head = {
        k.replace("projectors.model", "layers"): v for k, v in stored.items() if k.startswith("projectors")
    }
    objective.head.load_state_dict(head)
    z = stored["out.train.z"][None]
    found = losses(objective, z, stored["in.guidance"][None], (12,))["neg_cosine"]
    found.backward()
    assert abs(found - stored["out.train.proj_loss"]) < 2e-6
    first = objective.head.layers[0].weight.grad
    assert (first - stored["out.train.grad.projectors.model.0.weight"]).abs().max() < 5e-6


def test_jmas_compares_all_frames_of_the_batch(off: Off) -> None:
    stored = load_file(GOLDEN / "audio" / "jmas.safetensors")
    weights = load_file(GOLDEN / "audio" / "weights_jmas.safetensors")
    terms = {
        "mcos": {"distance": "cosine", "margin": 0.5},
        "mdms": {"distance": "l1", "margin": 0.25, "scope": "batch"},
    }
    objective = aligned(
        6, 20, on="latent.sample", projector="linear", bias=True, resize="bilinear", terms=terms, axes=1
    )
    head = {k.replace("ssl_loss.proj", "layers.0"): v for k, v in weights.items() if "ssl_loss" in k}
    objective.head.load_state_dict(head)
    z = stored["out.z"].transpose(1, 2)[None]
    found = losses(objective, z, stored["in.teacher"][None], (9,))
    assert abs(found["mcos"] - stored["out.mcos"]) < 2e-6
    assert abs(found["mdms"] - stored["out.mdms"]) < 1e-6
