"""Which modules FSDP2 deals over the processes of a run, in which parts, and which it cannot deal."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import nn

from vtp_core import distributed
from vtp_core.build import Model
from vtp_plugins.objective import AdversarialObjective


class Dealer:
    """Applies ``fully_shard``; weights and gradients are dealt along dim 0 over all processes.

    Args:
        device: of the weights.
        precision: of the run; in bfloat16 runs large modules fetch their weights in bfloat16.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        # Half a second that other runs do not need.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        self.entry, self._shard = register_fsdp_forward_method, fully_shard
        # Nobody writes into what he is handed, so that views are safe.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
        self._mesh = init_device_mesh(device.type, (distributed.world_size(),))
        self._wide = MixedPrecisionPolicy()
        self._narrow = self._wide
        if precision == "bfloat16":  # autocast casts inputs where it should: a noise level is not rounded
            self._narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def __call__(self, module: nn.Module, split: bool) -> Any:
        """Deal a module's weights, with ``split`` block by block; all but those that have no rows to deal."""
        whole = {
            parameter for parameter in module.parameters() if parameter.ndim == 0 or not parameter.numel()
        }
        policy = self._narrow if split else self._wide  # prototypes and text towers stay as they are
        for block in _blocks(module) if split else ():
            self._part(block, policy, whole)
            for name in getattr(block, "entries", ()):
                if name != "forward":
                    self.entry(block, name)
        return self._part(module, policy, whole)

    def _part(self, module: nn.Module, policy: Any, whole: set[nn.Parameter]) -> Any:
        # Resharding is said, as a root would keep its weights after a forward, and serve them once the optimizer
        # has moved.
        part = self._shard(
            module, mesh=self._mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=whole
        )
        if hasattr(part, "set_reduce_scatter_unused_params"):  # torch 2.14
            part.set_reduce_scatter_unused_params(True, recurse=False)
        return part


def _blocks(module: nn.Module) -> list[nn.Module]:
    """Entries of every ``nn.ModuleList`` named ``blocks``; none where one shares a weight with anything else."""
    lists = [getattr(part, "blocks", None) for part in module.modules()]
    blocks = [block for found in lists if isinstance(found, nn.ModuleList) for block in found]
    blocks = list(dict.fromkeys(filter(has_weights, blocks)))
    named = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    inside = [Counter(id(w) for _, w in b.named_parameters(remove_duplicate=False)) for b in blocks]
    shared = any(named[weight] != count for block in inside for weight, count in block.items())
    return [] if shared else blocks


def kept_whole(model: Model) -> dict[str, str]:
    """Owners that are not dealt, and why; those without weights are not named.

    FSDP2 fetches a module's weights for one forward at a time, by one root: who uses them otherwise needs them whole.
    """
    owners = {name: module for name, module in model.modules().items() if has_weights(module)}
    users: dict[int, list[str]] = {}
    for name, module in owners.items():
        for parameter in module.parameters():
            users.setdefault(id(parameter), []).append(name)
    through = {n for o in model.objectives.values() for need in o.needs.values() for n in need.through}
    found = {}
    for name, module in owners.items():
        others = {user for p in module.parameters() for user in users[id(p)]} - {name}
        if others:
            found[name] = f"shared with {', '.join(sorted(others))}"
        elif name.startswith("modules/"):
            found[name] = "objectives use it"
        elif name in through:
            found[name] = "an objective passes gradient through it"
        elif isinstance(module, AdversarialObjective):
            found[name] = "its critic has a turn of its own"
        elif name in model.objectives and not any(p.requires_grad for p in module.parameters()):
            found[name] = "nothing in it trains"
    return found


def has_weights(module: nn.Module) -> bool:
    """Whether there is anything to deal."""
    return next(module.parameters(), None) is not None
