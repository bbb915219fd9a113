"""Optimizers: a group for every owner of parameters, with schedules that are pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core import distributed, shards
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

    Of a parameter that is dealt over processes it moves the rows that this process holds, as plain tensors.

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
        self._moved = {id(p): shards.local(p) for p in self.parameters()}
        self._dealt = any(map(shards.is_shard, self.parameters()))
        self._names = {f"{owner}.{name}": p for owner, named in owners.items() for name, p in named.items()}
        groups: dict[str, list[dict[str, Any]]] = {}
        for owner, named in owners.items():
            if named:
                moved = {name: self._moved[id(p)] for name, p in named.items()}
                groups.setdefault(settings[owner].use, []).extend(_groups(owner, moved, settings[owner]))
        self.optimizers = {use: _optimizer(use, found) for use, found in groups.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter, in one fixed order."""
        return [parameter for parameters in self.owners.values() for parameter in parameters]

    def average(self) -> None:
        """Average the gradients over processes, of what each of them holds whole; FSDP2 has averaged the others."""
        distributed.average_gradients([p for p in self.parameters() if not shards.is_shard(p)])

    def step(self, step: int) -> None:
        """Set the rates of ``step`` and update; gradients are dropped after."""
        for parameter in self.parameters() if self._dealt else ():
            moved = self._moved[id(parameter)]
            moved.grad = None if parameter.grad is None else shards.local(parameter.grad)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, self.steps, self.settings[group["owner"]])
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Drop every gradient."""
        for parameter in self.parameters():
            parameter.grad = self._moved[id(parameter)].grad = None

    def rates(self, step: int) -> dict[str, float]:
        """Owner -> learning rate of a step."""
        return {owner: rate_at(step, self.steps, self.settings[owner]) for owner in self.owners}

    def norms(self) -> dict[str, Tensor]:
        """Owner -> L2 norm of its gradient over all processes, 0-d; the same on each of them."""
        found, rows = {}, {}
        for owner, parameters in self.owners.items():
            grads = [p.grad for p in parameters if p.grad is not None]
            whole = [grad for grad in grads if not shards.is_shard(grad)]
            if len(whole) < len(grads):
                rows[owner] = _norm([shards.local(grad) for grad in grads if shards.is_shard(grad)]).square()
            if grads:
                found[owner] = _norm(whole) if whole else torch.zeros_like(rows[owner])
        if rows:
            means = distributed.mean_over_processes(torch.stack(list(rows.values())))
            for owner, square in zip(rows, means * distributed.world_size(), strict=True):
                found[owner] = (found[owner].square() + square).sqrt()
        return found

    @torch.no_grad()
    def clip(self, norms: Mapping[str, Tensor], limit: float | None) -> None:
        """Scale all gradients together so that their norm is at most ``limit``; ``norms`` are by owner."""
        if limit is None or not norms:
            return
        whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        grads = [shards.local(p.grad) for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, (limit / (whole + 1e-6)).clamp(max=1.0).to(grads[0].dtype))

    def state(self) -> dict[str, Tensor]:
        """Optimizer tensors by ``use/owner.parameter/entry``, as this process holds them."""
        named = {id(self._moved[id(p)]): (name, p) for name, p in self._names.items()}
        tensors = {}
        for use, optimizer in self.optimizers.items():
            for moved, entries in optimizer.state.items():
                name, parameter = named[id(moved)]
                for entry, value in entries.items():
                    if value is not None:
                        tensors[f"{use}/{name}/{entry}"] = _as_held(parameter, moved, torch.as_tensor(value))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`; what was there before goes.

        Raises:
            StackFault: the tensors are of other optimizers or parameters.
        """
        for optimizer in self.optimizers.values():
            optimizer.state.clear()
        for key in tensors:
            use, _, rest = key.partition("/")
            name, _, entry = rest.rpartition("/")
            if use not in self.optimizers or name not in self._names:
                raise StackFault(
                    f"the checkpoint has optimizer state {key!r}, which the stack does not train"
                )
            parameter = self._names[name]
            value = shards.local(shards.held(parameter, tensors, key))
            self.optimizers[use].state[self._moved[id(parameter)]][entry] = value.to(
                parameter.device, copy=True
            )


def _norm(grads: list[Tensor]) -> Tensor:
    """L2 norm of several tensors, 0-d."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return norm


def _as_held(parameter: Tensor, moved: Tensor, value: Tensor) -> Tensor:
    """An optimizer's tensor: dealt as its parameter is, if it has a number for each of the parameter's."""
    dealt = shards.is_shard(parameter) and value.shape == moved.shape
    return shards.alike(parameter, value) if dealt else value


def _groups(owner: str, named: Mapping[str, Tensor], optim: Optim) -> Iterable[dict[str, Any]]:
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
