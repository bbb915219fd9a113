"""TensorBoard: the rows of ``metrics.jsonl`` and ``probes.jsonl`` as scalars."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp_core.errors import StackFault
from vtp_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from vtp_plugins.clock import Clock
    from vtp_plugins.reading import Reading
    from vtp_plugins.spec import Spec


class TensorBoard:
    """Writes scalars into ``RUN/tensorboard``; watch them with ``tensorboard --logdir runs``.

    A resumed run takes over from its first step: what a killed process wrote past that is dropped.

    Args:
        spec: shapes of the tokenizer; not read.

    Raises:
        StackFault: tensorboard is not installed.
    """

    def __init__(self, spec: Spec) -> None:
        try:
            self._new_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise StackFault(
                "train.trackers: tensorboard is not installed\nbring it: pip install tensorboard"
            ) from error
        self._writer: Any = None

    @hookimpl
    def vtp_step_end(self, engine: Any, clock: Clock, metrics: Mapping[str, float]) -> None:
        """Write one row."""
        step = int(metrics["step"])
        writer = self._opened(engine.run_path, step)
        if writer is not None:
            for name, value in metrics.items():
                if name != "step":
                    writer.add_scalar(name, value, step)

    @hookimpl
    def vtp_probe(self, engine: Any, step: int, readings: Sequence[Reading]) -> None:
        """Write the readings of one step as ``probe/<split>/<probe>``."""
        writer = self._opened(engine.run_path, step + 1)  # the row of this step is there already
        if writer is not None:
            for reading in readings:
                writer.add_scalar(f"probe/{reading.split}/{reading.probe}", reading.value, step)
            writer.flush()

    @hookimpl
    def vtp_finish(self, run: Path) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self, run: Path | None, first: int) -> Any:
        """The writer; made when the first step is known, as it hides older events from that step on."""
        if self._writer is None and run is not None:
            folder = run / "tensorboard"
            self._writer = self._new_writer(str(folder), purge_step=first, flush_secs=10)
        return self._writer
