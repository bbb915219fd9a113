"""FSDP2 over the modules of a run: which are dealt over its processes, and when their gradients are averaged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from vtp_core import distributed
from vtp_core.build import Model
from vtp_core.dealing import Dealer, has_weights, kept_whole
from vtp_core.gathering import Plain
from vtp_core.nodes import Stage
from vtp_core.options import Train
from vtp_core.reached import Reached
from vtp_core.teacher import EMATeacher

_SPLIT = ("encoder", "bottleneck", "decoder", "generator")
"""Owners that are dealt block by block; an objective may call its blocks in ways of its own."""


class Sharding:
    """The modules that FSDP2 deals over the processes of a run; none where they are replicated.

    Each is a root of its own: it fetches its weights for a forward or backward and drops them after.

    Args:
        model: on its device, its blocks recomputed if that is wanted.
        ema: the copies that teacher nodes and objectives read; dealt as their originals are.
        average: of the generator; likewise.
        keys: the stack's ``train``.
        device: where to compute.

    Attributes:
        roots: what is dealt, by owner.
        whole: what every process holds in full all the same, and why, by owner.
        plain: the modules to measure with; None where nothing is dealt.
    """

    def __init__(
        self, model: Model, ema: EMATeacher, average: EMATeacher, keys: Train, device: torch.device
    ) -> None:
        self.roots: dict[str, Any] = {}
        self.whole: dict[str, str] = {}
        self.plain: Plain | None = None
        self._narrow = keys.precision == "bfloat16"
        self._synced: dict[str, bool] = {}
        self._own: set[str] = set()  # reached by the backward in progress
        self._waiting: set[str] = set()  # whose gradients are summed here and not averaged yet
        self._idle: set[Any] = set()  # that ran and get no backward
        self._open: set[Any] = set()  # copies whose weights an objective has fetched
        self._reached = Reached()
        if keys.parallel == "fsdp2" and distributed.world_size() > 1:
            self.whole = kept_whole(model)
            self._deal = Dealer(device, keys.precision)
            self._begin(model, {"ema": ema, "average": average})

    def _begin(self, model: Model, copies: Mapping[str, EMATeacher]) -> None:
        named = {name: module for name, module in model.modules().items() if name not in self.whole}
        named = {name: module for name, module in named.items() if has_weights(module)}
        if named:
            self.plain = Plain(model, copies["average"].modules.get("generator"))
        for kind, teacher in copies.items():
            self._begin_copies(kind, teacher, named)
        for name, module in named.items():
            anchors = anchors_of(module)
            self.roots[name] = root = self._deal(module, name in _SPLIT)
            root.anchored = anchors
            if any(parameter.requires_grad for parameter in module.parameters()):
                root.register_forward_hook(self._watch(name))
                self._reached.watch(root)
                root.touch = MethodType(_touch, root)
                self._deal.entry(root, "touch")
            else:
                root.register_forward_hook(lambda root, *_: self._idle.add(root))
        for teacher in copies.values():
            teacher.bind()

    def _begin_copies(self, kind: str, teacher: EMATeacher, named: Mapping[str, nn.Module]) -> None:
        """Deal the copies of what is dealt; those that an objective holds are open while its stage lasts."""
        found: dict[int, Any] = {}
        for name, twin in teacher.modules.items():
            _, _, rest = name.partition("objectives/")
            owner = rest.rpartition("/")[0] or name
            if owner not in named or not has_weights(twin):
                continue
            if id(twin) not in found:
                found[id(twin)] = root = self._deal(twin, split=not rest)
                root.register_forward_hook(lambda root, *_: self._idle.add(root))
                root.set_reshard_after_forward(not rest)
            if rest:
                named[owner].register_forward_pre_hook(self._opener(found[id(twin)]))

    def _opener(self, twin: Any) -> Callable[..., None]:
        def fetch(*_: Any) -> None:
            twin.unshard()
            self._open.add(twin)

        return fetch

    def _watch(self, name: str) -> Callable[..., None]:
        """Note a backward that reaches the outputs of a module."""

        def note(root: Any, _: Any, outputs: Any) -> None:
            if not torch.is_grad_enabled():
                return
            self._reached.called(name, tensors := _with_gradient(outputs))
            if tensors:
                register_multi_grad_hook(tensors, lambda _: self._own.add(name), mode="any")

        return note

    # ---- a step

    def lasts(self, stages: Sequence[Stage], last: bool = True) -> list[frozenset[str]]:
        """For every stage the owners that no later one of the step uses; ``last`` is of the micro-batch."""
        later: set[str] = set()
        found = []
        for stage in reversed(stages):
            own = {node.module for node in stage.nodes if not node.through} | set(stage.readers)
            found.append(frozenset(own - later) if last else frozenset())
            later |= own
        return found[::-1]

    def backward(
        self, outputs: Sequence[Tensor], done: Collection[str], gradients: Sequence[Tensor] | None = None
    ) -> None:
        """Backward of some outputs; gradients of the owners in ``done`` are averaged, others are summed and wait.

        So a weight that several stages or micro-batches use is averaged once a step, at the price of its whole
        gradient meanwhile.

        Args:
            outputs: losses, or tensors with ``gradients``; none where this process has no gradient to give.
            done: owners whose last backward of the step this is.
            gradients: of the outputs.

        Raises:
            PluginFault: weights are dealt, and only some processes have a gradient to give.
        """
        if self.roots:
            self._reached.agree(outputs)
        if not outputs:
            return
        # What waits is float32, in bfloat16 too: FSDP2 does not reduce it together with what comes now.
        averaged = set(done) - (self._waiting if self._narrow else set())
        for name in self.roots:
            self._sync(name, name in averaged)
        self._own.clear()
        torch.autograd.backward(outputs, gradients)
        self._waiting = (self._waiting | self._own) - (self._own & averaged)

    def _sync(self, name: str, on: bool) -> None:
        if self._synced.get(name) != on:
            self.roots[name].set_requires_gradient_sync(on)
            self._synced[name] = on

    def close(self) -> None:
        """A stage is over: drop the weights of the copies that its objectives read."""
        for twin in self._open:
            twin.reshard()
        self._open.clear()

    def settle(self) -> None:
        """Average what still waits; an objective may have cut off the last backward that was to do it."""
        for name in [name for name in self.roots if name in self._waiting]:
            self._sync(name, True)
            self.roots[name].touch().backward()
        self._waiting.clear()
        self._reached.settle()

    def rest(self) -> None:
        """The step is over: forget the forwards that no backward followed, or FSDP2 would keep note of each."""
        for root in self._idle:
            if hasattr(root, "reset_iter_state"):
                root.reset_iter_state()
        self._idle.clear()


def anchors_of(module: Any) -> dict[str, str]:
    """Names of the parameters behind a module's ``anchors``, which may be found once and kept."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    anchors: Mapping[str, nn.Parameter] = getattr(module, "anchors", {})
    return {anchor: names[id(p)] for anchor, p in anchors.items() if id(p) in names}


def unsharded(root: Any, name: str) -> nn.Parameter:
    """A parameter as the graph of the last forward knows it, for ``torch.autograd.grad``; its values are not there."""
    path = name.split(".")[:-1]
    inside = [root, *(root.get_submodule(".".join(path[: n + 1])) for n in range(len(path)))]
    part: Any = [module for module in inside if hasattr(module, "unshard")][-1]
    part.unshard()
    try:
        found: nn.Parameter = root.get_parameter(name)
        return found
    finally:
        part.reshard()


def _touch(root: nn.Module) -> Tensor:
    """A forward without a weight, whose backward makes FSDP2 average what it has summed."""
    return torch.zeros((), device=next(root.parameters()).device, requires_grad=True)


def _with_gradient(outputs: Any) -> list[Tensor]:
    """The tensors of a module's outputs that gradient can reach."""
    if isinstance(outputs, Mapping):
        return [tensor for value in outputs.values() for tensor in _with_gradient(value)]
    if isinstance(outputs, tuple):
        return [tensor for value in outputs for tensor in _with_gradient(value)]
    return [outputs] if isinstance(outputs, Tensor) and outputs.requires_grad else []
