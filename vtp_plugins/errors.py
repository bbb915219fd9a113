"""Faults that people can mend, each with the exit code it ends a command with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Fault(Exception):
    """A fault with a message for people.

    Attributes:
        code: exit code of the command that it ends.
        lines: that a command shows of the message; of a longer one the middle is left out.
    """

    code = 1
    lines = 6


class StackFault(Fault, ValueError):
    """Any fault in the stack: a key, a name, a value, a combination."""

    code = 2


class PluginFault(Fault):
    """A named plugin fails to import, is doubled or breaks the contract."""

    code = 3


class DataFault(Fault):
    """Data or weights are missing or broken."""

    code = 4


class NonFinite(Fault):
    """A loss or a gradient is not finite; no weight has moved."""

    code = 5


class MemoryFault(Fault):
    """The device's memory is exhausted."""

    code = 6


class StorageFault(Fault):
    """Storage is full or a checkpoint cannot be written or read."""

    code = 7


def suggestion(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the list of what is known when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
