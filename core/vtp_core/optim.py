"""Optimizers: a group for every owner of parameters, with schedules that are pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core.errors import StackFault
from vtp_core.options import Optim, steps_of

_OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
_UNDECAYED = ("cls_token", "mask_token", "positional_embedding", "pos_embed", "weight_g")


def rate_at(step: int, steps: int, optim: Optim) -> float:
    """Learning rate of a step: linear warm-up, then the schedule down to ``final`` times the peak."""
    if step < steps_of(optim.freeze, steps):
        return 0.0
    warmup = steps_of(optim.warmup, steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    if optim.schedule == "constant":
        return optim.lr
    fall = 0.5 * (1 + math.cos(math.pi * share)) if optim.schedule == "cosine" else 1 - share
    return optim.lr * (optim.final + (1 - optim.final) * fall)


class Optimizers:
    """One optimizer per kind in use; its groups carry the owner's name.

    Args:
        owners: owner -> named trainable parameters.
        settings: owner -> its ``optim``.
        steps: of the run.
    """

    def __init__(
        self, owners: Mapping[str, Mapping[str, nn.Parameter]], settings: Mapping[str, Optim], steps: int
    ) -> None:
        self.steps = steps
        self.settings = settings
        self.owners = {owner: list(named.values()) for owner, named in owners.items() if named}
        self._names = {
            id(p): f"{owner}.{name}" for owner, named in owners.items() for name, p in named.items()
        }
        groups: dict[str, list[dict[str, Any]]] = {}
        for owner, named in owners.items():
            if named:
                groups.setdefault(settings[owner].use, []).extend(_groups(owner, named, settings[owner]))
        self.optimizers = {use: _optimizer(use, found) for use, found in groups.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, in one fixed order."""
        return [parameter for parameters in self.owners.values() for parameter in parameters]

    def step(self, step: int) -> None:
        """Set the rates of ``step`` and update; gradients are dropped after."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, self.steps, self.settings[group["owner"]])
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters():
            parameter.grad = None

    def rates(self, step: int) -> dict[str, float]:
        """Owner -> learning rate of a step."""
        return {owner: rate_at(step, self.steps, self.settings[owner]) for owner in self.owners}

    def norms(self) -> dict[str, Tensor]:
        """Owner -> L2 norm of its gradient, float32 0-d."""
        found = {}
        for owner, parameters in self.owners.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            if grads:
                found[owner] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        return found

    @torch.no_grad()
    def clip(self, norms: Mapping[str, Tensor], limit: float | None) -> None:
        """Scale all gradients together so that their norm is at most ``limit``; ``norms`` are by owner."""
        if limit is None or not norms:
            return
        whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, (limit / (whole + 1e-6)).clamp(max=1.0).to(grads[0].dtype))

    def state(self) -> dict[str, Tensor]:
        """Optimizer tensors by ``use/owner.parameter/entry``."""
        tensors = {}
        for use, optimizer in self.optimizers.items():
            for parameter, entries in optimizer.state.items():
                for entry, value in entries.items():
                    if value is not None:
                        tensors[f"{use}/{self._names[id(parameter)]}/{entry}"] = torch.as_tensor(value)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`; what was there before goes.

        Raises:
            StackFault: the tensors are of other optimizers or parameters.
        """
        parameters = {self._names[id(p)]: p for p in self.parameters()}
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key, value in tensors.items():
            use, _, rest = key.partition("/")
            name, _, entry = rest.rpartition("/")
            if use not in self.optimizers or name not in parameters:
                raise StackFault(
                    f"the checkpoint has optimizer state {key!r}, which the stack does not train"
                )
            self.optimizers[use].state[parameters[name]][entry] = value.to(parameters[name].device, copy=True)


def _groups(owner: str, named: Mapping[str, nn.Parameter], optim: Optim) -> Iterable[dict[str, Any]]:
    """Matrices decay; vectors and tokens don't."""
    decayed = [p for n, p in named.items() if p.ndim > 1 and not n.endswith(_UNDECAYED)]
    spared = [p for n, p in named.items() if p.ndim <= 1 or n.endswith(_UNDECAYED)]
    for parameters, decay in ((decayed, optim.weight_decay), (spared, 0.0)):
        if parameters:
            group: dict[str, Any] = {
                "params": parameters,
                "owner": owner,
                "lr": optim.lr,
                "weight_decay": decay,
            }
            if optim.use != "sgd":
                group |= {"betas": optim.betas, "eps": optim.eps}
            else:
                group |= {"momentum": optim.betas[0]}
            yield group


def _optimizer(use: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    dtypes = {p.dtype for group in groups for p in group["params"]}
    fused = dtypes <= {torch.float32, torch.float64} and use != "sgd"
    optimizer: torch.optim.Optimizer = (
        _OPTIMIZERS[use](groups, fused=fused) if fused else _OPTIMIZERS[use](groups)
    )
    return optimizer
