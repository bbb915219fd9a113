"""The contract of importers: weights of another code base to a stack and the tensors of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from vtp_plugins.errors import DataFault

if TYPE_CHECKING:
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 8  # tensors that a line of the table names


@dataclass(frozen=True, slots=True)
class Converted:
    """What an importer makes of a state dict.

    Attributes:
        sections: of a stack, plain values: ``encoder``, ``bottleneck`` and ``decoder``, or ``generator`` and
            ``sampler``.
        parts: tensors by checkpoint part: ``tokenizer`` with names ``encoder...``, ``bottleneck.links.0...``
            and ``decoder...``, or ``generator``.
        statistics: ``mean`` and ``std`` of the latent, (C,) or (C, *grid), where the weights hold them.
        latent: (C, *grid) that a generator makes, (C,) where its weights don't tell a grid; empty for a
            tokenizer.
        classes: labels that a generator knows.
        left: tensors that were left out, as they belong to others.
    """

    sections: Mapping[str, Any]
    parts: Mapping[str, Mapping[str, Tensor]]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    latent: tuple[int, ...] = ()
    classes: int = 0
    left: tuple[str, ...] = ()


class Importer(Protocol):
    """Group ``importers``: an object, not a class. Declares ``holders`` and ``settings`` where its files need it.

    ``settings(config)`` gives options of ``convert`` out of the ``config.json`` beside the file, none of another's;
    those on the command line win.

    ``convert`` may take more keyword-only arguments: what the weights don't tell, checked against their
    annotations and written ``key=value`` on the command line. Time and sign are turned here: the generator's
    section says ``flip`` or ``timesteps``, its path, and the sampler of the publication, in our noise level u.
    """

    def convert(self, tensors: Mapping[str, Tensor]) -> Converted:
        """The stack and the tensors of our modules, exactly.

        Args:
            tensors: a state dict under its published names. ``vtp convert`` has unwrapped it, by the names or
                prefixes in ``holders`` before the usual ones (``ema``, ``state_dict``, ``model``).

        Raises:
            Mismatch: tensors are unknown, missing or of another shape.
            ValueError: an option is missing or impossible; the message begins with it.
        """
        ...


class Mismatch(DataFault, ValueError):
    """Tensors that are not those of the network; the message is a table."""

    lines = 20


def check_tensors(found: Shapes, wanted: Shapes) -> None:
    """Refuse a state dict that is not the one that the network has.

    Args:
        found: shapes of its tensors.
        wanted: shapes that belong there.

    Raises:
        Mismatch: with one line for those unknown, one for those missing, one for those of another shape.
    """
    shared = found.keys() & wanted.keys()
    table = {
        "unknown": {name: f"{tuple(found[name])}" for name in found.keys() - shared},
        "missing": {name: f"{tuple(wanted[name])}" for name in wanted.keys() - shared},
        "of another shape": {
            name: f"{tuple(found[name])} for {tuple(wanted[name])}"
            for name in shared
            if tuple(found[name]) != tuple(wanted[name])
        },
    }
    refuse(table)


def refuse(table: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse tensors that are at fault.

    Args:
        table: kind of fault -> tensor -> what to tell of it, its shape.

    Raises:
        Mismatch: there are some; with one line for each kind.
    """
    lines = [_line(what, tensors) for what, tensors in table.items() if tensors]
    if lines:
        raise Mismatch("\n".join(lines))


def _line(what: str, shapes: Mapping[str, str]) -> str:
    """``3 tensors missing: a (2,), b (3, 4), ...``."""
    names = sorted(shapes)
    told = ", ".join(f"{name} {shapes[name]}" for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {told}{more}"
