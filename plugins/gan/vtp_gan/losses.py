"""Losses on logits: hinge, vanilla, least squares, gradient penalty, and the moving anchors of LeCam."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["hinge", "vanilla", "lsgan"]


def critic_loss(kind: Kind, logits: Tensor, real: bool) -> Tensor:
    """The critic's half: hinge and vanilla as arXiv 2012.09841 uses them, lsgan of arXiv 1611.04076, eq. 9."""
    signed = -logits if real else logits
    if kind == "hinge":
        return 0.5 * F.relu(1 + signed).mean()
    if kind == "vanilla":
        return 0.5 * F.softplus(signed).mean()
    return 0.5 * (logits - float(real)).square().mean()


def generator_loss(kind: Kind, logits: Tensor, saturates: bool) -> Tensor:
    """What the generator pays for logits of its pictures.

    Hinge and vanilla pay -logit, as in taming; lsgan pays (1 - logit)^2. Without saturation every kind pays
    softplus(-logit) (arXiv 1406.2661, section 3).
    """
    if not saturates:
        return F.softplus(-logits).mean()
    return (1 - logits).square().mean() if kind == "lsgan" else -logits.mean()


def gradient_penalty(logits: Tensor, real: Tensor) -> Tensor:
    """Half the squared gradient of a sample's mean logit by the sample (arXiv 1801.04406, eq. 9), averaged.

    Args:
        logits: (B, ...), of ``real``, each of its own sample alone.
        real: (B, ch, H, W), a leaf in [-1, 1].
    """
    scores = logits.flatten(1).mean(1).sum()
    (grad,) = torch.autograd.grad(scores, real, create_graph=True)
    return 0.5 * grad.flatten(1).square().sum(1).mean()


def lecam_distance(real: Tensor, fake: Tensor, anchors: Tensor) -> Tensor:
    """Squared distances of each side's logits from the other side's moving mean (arXiv 2104.03310, eq. 4).

    Args:
        real: logits of real pictures.
        fake: logits of fake ones.
        anchors: (2,) moving means of real and of fake logits.
    """
    return (real - anchors[1]).square().mean() + (fake - anchors[0]).square().mean()
