"""The base class of every objective: it declares what it reads and turns it into losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from vtp_plugins.clock import Clock
    from vtp_plugins.needs import Need, Outputs
    from vtp_plugins.protocols import MaskSampler, View


class Objective(nn.Module):
    """Losses over outputs that the engine computes.

    A subclass is built as ``Class(spec, *, option=default, ...)``, sets ``self.needs`` and implements
    :meth:`forward`. Nothing else is compulsory. ``weight``, ``rows``, ``start``, ``stop``, ``every``,
    ``repeat``, ``warmup``, ``balance`` and ``optim`` belong to the stack; an objective never sees them.

    Attributes:
        needs: slot name -> what is read; the slots are the keys of ``got``.
        views: views it brings; equal definitions of two objectives merge.
        masks: mask samplers it brings, by the name that ``Need.mask`` and ``patches@NAME`` use.
        shadow: submodules that need an EMA copy, found with :meth:`ema`.
        exports: names of methods and modules that travel with the tokenizer.
        coupled: a row's loss depends on other rows (contrastive, KoLeo, Sinkhorn, a count that varies), so it
            gathers over processes, and micro-batches cannot be taken one by one.
        pending: tensors that :meth:`forward` wants merged; :meth:`settle` merges them.
    """

    needs: Mapping[str, Need]
    views: Mapping[str, View]
    masks: Mapping[str, MaskSampler]
    shadow: ClassVar[tuple[str, ...]] = ()
    exports: tuple[str, ...] = ()
    coupled: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.needs = {}
        self.views = {}
        self.masks = {}
        self.pending: dict[str, Tensor] = {}
        self._shadows: dict[str, nn.Module] = {}  # a dict, so that EMA copies are no submodules

    def bind_shadows(self, copies: Mapping[str, nn.Module]) -> None:
        """Hand over the EMA copies of the modules named in ``shadow``; the engine calls it once."""
        self._shadows = dict(copies)

    def ema(self, name: str) -> nn.Module:
        """The EMA copy of submodule ``name``.

        Raises:
            LookupError: no copy was bound: ``name`` is missing from ``shadow``, or there is no engine.
        """
        if name not in self._shadows:
            raise LookupError(
                f"{type(self).__name__}: no EMA copy of {name!r}; name it in 'shadow', and outside an "
                "engine call bind_shadows first"
            )
        return self._shadows[name]

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Losses by term, each a scalar whose mean over processes is the whole batch's loss.

        Changes no state. Computes in float32 at least.
        """
        raise NotImplementedError

    def settle(self, clock: Clock) -> None:
        """Merge ``pending`` into buffers; called once a step, after the finite check, before the optimizers.

        Once more after a critic's turn on fresh input, and where the critic alone has begun.
        """
        self.pending.clear()


class AdversarialObjective(Objective):
    """An objective with a critic that has its own optimizer and its own turn.

    ``forward`` gives the tokenizer's losses and trains everything but ``critic``; ``critique`` gives the
    critic's losses on detached outputs. The stack's ``critic:`` says when the turn comes.
    """

    critic: nn.Module

    def critique(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Losses of the critic by term; every tensor of ``got`` is detached."""
        raise NotImplementedError
