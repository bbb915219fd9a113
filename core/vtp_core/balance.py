"""Weights by gradient ratio: an objective's pull matches another's at an anchor (arXiv 2012.09841, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.distributed import mean_over_processes
from vtp_core.errors import StackFault, suggestion
from vtp_core.options import Balance


def anchor_of(model: Model, at: str) -> nn.Parameter:
    """The parameter that ``decoder.last`` names: the module's ``anchors["last"]``."""
    module_name, _, name = at.partition(".")
    anchors = getattr(model.modules().get(module_name), "anchors", {})
    if name not in anchors:
        known = [f"{n}.{a}" for n, m in model.modules().items() for a in getattr(m, "anchors", {})]
        raise StackFault(f"balance.at: no anchor {at!r}{suggestion(at, known)}")
    anchor: nn.Parameter = anchors[name]
    return anchor


def ratio(loss: Tensor, against: Tensor, anchor: nn.Parameter, keys: Balance) -> Tensor:
    """||d against|| / (||d loss|| + eps) at the anchor, at most ``max``; of the whole batch's gradients.

    Where a step accumulates, every micro-batch has its own ratio.

    Args:
        loss: of the balanced objective, before its weight: the weight multiplies the ratio.
        against: of the reference, with its weight: what is matched is the pull it has.
        anchor: where the gradients are taken.
        keys: the stack's ``balance``.
    """
    if not anchor.requires_grad:
        raise StackFault(f"balance.at: {keys.at} is frozen and gets no gradient; name an anchor that trains")
    norms = []
    for what, value in ((keys.against, against), ("this objective", loss)):
        (grad,) = torch.autograd.grad(value, anchor, retain_graph=True, allow_unused=True)
        if grad is None:
            raise StackFault(
                f"balance.at: {keys.at} gets no gradient from {what!r}; name an anchor that both reach"
            )
        norms.append(torch.linalg.vector_norm(mean_over_processes(grad.contiguous())))
    quotient: Tensor = norms[0] / (norms[1] + keys.eps)
    return quotient.clamp(max=keys.max).detach()
