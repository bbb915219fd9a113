"""Weights by gradient ratio: an objective's pull matches another's at an anchor (arXiv 2012.09841, eq. 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.distributed import mean_over_processes
from vtp_core.errors import StackFault, suggestion
from vtp_core.options import Balance
from vtp_core.sharding import unsharded

Gradient = Callable[[Tensor, nn.Parameter], Tensor | None]


def anchor_of(model: Model, at: str) -> nn.Parameter:
    """The parameter that ``decoder.last`` names: the module's ``anchors["last"]``."""
    module_name, _, name = at.partition(".")
    module: Any = model.modules().get(module_name)
    anchors = getattr(module, "anchors", {})
    if name not in anchors:
        known = [f"{n}.{a}" for n, m in model.modules().items() for a in getattr(m, "anchors", {})]
        raise StackFault(f"balance.at: no anchor {at!r}{suggestion(at, known)}")
    anchor: nn.Parameter = anchors[name]
    return unsharded(module, module.anchored[name]) if hasattr(module, "anchored") else anchor


def gradient(value: Tensor, anchor: nn.Parameter) -> Tensor | None:
    """Gradient of a loss at the anchor; None where it does not reach it."""
    found: Tensor | None
    (found,) = torch.autograd.grad(value, anchor, retain_graph=True, allow_unused=True)
    return found


def ratio(
    loss: Tensor, against: Tensor, anchor: nn.Parameter, keys: Balance, gradient: Gradient = gradient
) -> Tensor:
    """||d against|| / (||d loss|| + eps) at the anchor, at most ``max``; of the whole batch's gradients.

    Args:
        loss: of the balanced objective, before its weight: the weight multiplies the ratio.
        against: of the reference, with its weight: what is matched is the pull it has.
        anchor: where the gradients are taken.
        keys: the stack's ``balance``.
        gradient: of a loss at the anchor.
    """
    if not anchor.requires_grad:
        raise StackFault(f"balance.at: {keys.at} is frozen and gets no gradient; name an anchor that trains")
    norms = []
    for what, value in ((keys.against, against), ("this objective", loss)):
        grad = gradient(value, anchor)
        if grad is None:
            raise StackFault(
                f"balance.at: {keys.at} gets no gradient from {what!r}; name an anchor that both reach"
            )
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        norms.append(torch.linalg.vector_norm(mean_over_processes(grad)))
    quotient: Tensor = norms[0] / (norms[1] + keys.eps)
    return quotient.clamp(max=keys.max).detach()
