"""The EMA teacher: float32 copies of what the needs ask for, moved towards the student once a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vtp_core import shards
from vtp_core.run.saved import under


def momentum_at(share: float, bounds: tuple[float, float]) -> float:
    """Momentum by cosine from ``bounds[0]`` to ``bounds[1]`` over the run (DINOv2)."""
    first, last = bounds
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


class EMATeacher:
    """Copies of modules, never trained by gradient.

    Args:
        modules: what to copy, by name. Modules that occur twice under two names are copied once.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        copies: dict[int, nn.Module] = {}
        self.modules: dict[str, nn.Module] = {}
        self._pairs: list[tuple[nn.Module, nn.Module]] = []  # copy and original
        for name, module in modules.items():
            if id(module) not in copies:
                copies[id(module)] = _copied(module)
                self._pairs.append((copies[id(module)], module))
            self.modules[name] = copies[id(module)]
        self.bind()

    def bind(self) -> None:
        """Find the tensors that move: all weights, or the rows of them that this process holds."""
        self._teacher = [shards.local(p) for twin, _ in self._pairs for p in twin.parameters()]
        self._student = [shards.local(p) for _, module in self._pairs for p in module.parameters()]
        self._buffers = [
            buffers
            for twin, module in self._pairs
            for buffers in zip(twin.buffers(), module.buffers(), strict=True)
        ]

    @torch.no_grad()
    def update(self, momentum: float, buffers: bool = False) -> None:
        """theta_t <- m theta_t + (1 - m) theta_s over parameters (arXiv 2304.07193).

        Args:
            momentum: m in [0, 1].
            buffers: average those too, as a generator with batch norm needs; counters are copied.
        """
        for own, other in self._buffers if buffers else ():
            if own.is_floating_point():
                own.lerp_(other.to(own.dtype), 1.0 - momentum)
            else:
                own.copy_(other)
        if self._teacher:
            student = [
                s if s.dtype == t.dtype else s.to(t.dtype)
                for t, s in zip(self._teacher, self._student, strict=True)
            ]
            torch._foreach_lerp_(self._teacher, student, 1.0 - momentum)

    def state(self) -> dict[str, Tensor]:
        """Tensors by ``name.key``; a module with two names is kept under its first."""
        seen: set[int] = set()
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            if id(module) in seen:
                continue
            seen.add(id(module))
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        seen: set[int] = set()
        for name, module in self.modules.items():
            if id(module) not in seen:
                seen.add(id(module))
                own = shards.dealt(module.state_dict(), under(tensors, f"{name}."))
                module.load_state_dict(dict(own))


def _copied(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).requires_grad_(False).eval()
    for parameter in twin.parameters():
        if parameter.dtype in {torch.bfloat16, torch.float16}:
            parameter.data = parameter.data.float()  # a bf16 average does not move
    return twin
