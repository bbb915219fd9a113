"""A run begins, or goes on where processes of the same launcher died."""

from __future__ import annotations

import itertools
from pathlib import Path

from vtp_core import adopting, distributed
from vtp_core.devices import device_of
from vtp_core.run.directory import RunDirectory
from vtp_core.stack import Stack, load_run_stack
from vtp_core.training import Training

_RUNS = itertools.count()  # that this process has begun


def train(stack: Stack, resume: Path | None = None) -> RunDirectory:
    """Train a stack to its last step.

    Args:
        stack: loaded with :func:`vtp_core.load_stack`.
        resume: a run directory of this very stack, continued from its newest valid checkpoint.

    Returns:
        The run directory, with metrics, probes, checkpoints and, where a hook writes one, the report.

    Raises:
        StackFault, PluginFault, DataFault, NonFinite, MemoryFault, StorageFault: see ``vtp_plugins.errors``.
        Preempted: SIGTERM, SIGINT or another signal that ends processes came; the run can be continued.
        PeerFault: another process of the run failed, died or hangs. With several processes signals are ignored
            from any of these on, as the launcher sends them to whoever leaves after the first.
    """
    return begin(stack, resume).run()


def begin(stack: Stack, resume: Path | None = None) -> Training:
    """A run that is ready to train; the one begun already if torchrun has started these processes again."""
    number, place = next(_RUNS), None
    distributed.start(device_of(stack.train.device), stack.train.timeout)
    found, made = distributed.begun(number)
    if resume is None and found is not None:
        place = Path(found)
        if made:
            resume, stack = place, _own(stack, place)
    return Training(stack, resume, lambda path: distributed.remember(number, str(path)), place)


def _own(stack: Stack, run: Path) -> Stack:
    """The stack of a run begun already: the one at hand if the run has it, as secrets are masked in the run's."""
    settled = adopting.settled(stack)
    return settled if RunDirectory(run).holds(settled.config) else load_run_stack(run, stack.registry)
