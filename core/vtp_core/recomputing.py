"""Activation checkpointing: a block keeps its input alone and is computed again in the backward (arXiv 1604.06174)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LISTS = ("blocks", "resblocks")
"""Names under which modules list their blocks; ``resblocks`` is open_clip's."""


def recompute(modules: Iterable[nn.Module]) -> None:
    """Let every block be computed again in the backward; weights, keys and values stay as they are.

    Where no gradient is asked for, a block runs as before. Draws are keyed and random states kept, so the
    second computation is the first.

    Args:
        modules: whose blocks are meant, as far down as they lie: the entries of every ``nn.ModuleList`` named
            ``blocks`` or ``resblocks``. A block is entered by ``forward`` and by what its class names in
            ``entries``.
    """
    for block in blocks_of(modules):
        for name in getattr(block, "entries", ("forward",)):
            if name not in vars(block):
                setattr(block, name, MethodType(_entered(name), block))  # a copy of the block gets its own


def blocks_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Every block once, though modules may share it."""
    found: dict[int, nn.Module] = {}
    for part in (part for module in modules for part in module.modules()):
        lists = [getattr(part, name, None) for name in LISTS]
        found |= {id(b): b for blocks in lists if isinstance(blocks, nn.ModuleList) for b in blocks}
    return list(found.values())


def _entered(name: str) -> Callable[..., Any]:
    def enter(block: nn.Module, *args: Any, **keys: Any) -> Any:
        method = getattr(type(block), name)
        if not torch.is_grad_enabled():
            return method(block, *args, **keys)
        training, given = block.training, _given(block)

        def again(*args: Any, **keys: Any) -> Any:
            with _mode(block, training):
                if given:
                    return torch.func.functional_call(_Entry(block, method), given, args, keys)
                return method(block, *args, **keys)

        return checkpoint(again, *args, use_reentrant=False, **keys)

    return enter


@contextlib.contextmanager
def _mode(block: nn.Module, training: bool) -> Iterator[None]:
    """The mode of the forward, which may be over when the backward comes."""
    now = block.training
    if now != training:
        block.train(training)
    try:
        yield
    finally:
        if now != training:
            block.train(now)


def _given(block: nn.Module) -> dict[str, Tensor]:
    """Tensors that stand in for the block's parameters for this forward alone, as ``through`` has it."""
    named = dict(block.named_parameters())
    swapped = any(not isinstance(p, nn.Parameter) for p in named.values())
    return {f"block.{key}": value for key, value in named.items()} if swapped else {}


class _Entry(nn.Module):
    """A method of a block as a module, so that the block's hooks stay out of it."""

    def __init__(self, block: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.method = block, method

    def forward(self, *args: Any, **keys: Any) -> Any:
        return self.method(self.block, *args, **keys)
