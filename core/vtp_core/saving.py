"""A run's checkpoints as training goes: a full disk is waited out, and every ending says how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from vtp_core import distributed
from vtp_core.errors import DataFault, NonFinite, StorageFault
from vtp_core.run import checkpoint
from vtp_core.run.directory import RunDirectory
from vtp_plugins.registry import Registry

FAILURES = 3  # checkpoints in a row that may fail before the run gives up
_FILE = " (file)"  # how the registry ends the name of a single-file plugin


class Saver:
    """Writes checkpoints of one run.

    Args:
        directory: of the run.
        keep: how many stay.

    Attributes:
        saved: step of the newest one; None without any.
        note: told about a checkpoint that could not be written.
    """

    def __init__(self, directory: RunDirectory, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self.saved: int | None = None
        self.note: Callable[[str], object] = lambda line: None
        self._failures = 0

    def newest(self) -> Path | None:
        """The newest valid checkpoint; None for a run that never wrote one. Every process calls this.

        Raises:
            DataFault: all that were written are broken.
        """
        folder = self.directory.checkpoints
        first = distributed.rank() == 0  # which hashes them, and tells the others
        name = distributed.told(getattr(checkpoint.latest(folder), "name", "") if first else None)
        found = folder / name if name else None
        if found is not None:
            self.saved = checkpoint.step_of(found)
        elif self.directory.finished or any(folder.glob("step-*")):
            run = shlex.quote(str(self.directory.path))
            raise DataFault(f"{run} has no valid checkpoint left; begin anew: vtp train {run} run.dir=NEW")
        return found

    def save(self, parts: Mapping[str, Mapping[str, Tensor]], step: int, last: bool = False) -> None:
        """Write the checkpoint of ``step``; every process calls this, and it ends alike on all of them.

        Raises:
            StorageFault: it could not be written, and neither could those before it; with ``last`` at once.
        """
        try:
            checkpoint.save(self.directory.checkpoints, step, parts, {"step": step}, keep=self.keep)
            self.saved, self._failures = step, 0
        except StorageFault as fault:
            self._failures += 1
            if last or self._failures == FAILURES:
                raise
            self.note(f"{fault} (attempt {self._failures} of {FAILURES}; training goes on)")

    def warn(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Note a disk that has little room for checkpoints."""
        if tight := checkpoint.short_of_room(self.directory.checkpoints, parts):
            self.note(tight)

    def way_on(self, registry: Registry, fault: Exception | None = None) -> str:
        """How to continue, as the last line of a message; empty where the fault says it."""
        if isinstance(fault, StorageFault):
            return ""
        run = str(self.directory.path)
        owners = sorted({entry.distribution for entry in registry.entries()})
        named = [owner.removesuffix(_FILE) for owner in owners if owner.endswith(_FILE)]
        files = [word for path in named for word in ("--plugin", path)]
        resume = shlex.join([*distributed.command(), "resume", run, *files])
        if isinstance(fault, NonFinite):
            return f"as it is, a resumed run would repeat it; change {run}/stack.yaml before: {resume}"
        if self.saved is None:
            return f"no checkpoint was written yet; begin it again with: {resume}"
        return f"step {self.saved} is saved; continue with: {resume}"
