"""How a run ends before its time: what is still saved, what is recorded, and what people are told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from vtp_core import agreement, distributed
from vtp_core.agreement import Drifted
from vtp_core.attribution import parts_of, translated
from vtp_core.errors import Fault, StorageFault
from vtp_core.peers import PeerFault
from vtp_core.stopping import Interrupted, Preempted, deaf, handled

if TYPE_CHECKING:
    from vtp_core.training import Training


class Ending:
    """The end of one run.

    Args:
        run: whose end it is.
    """

    def __init__(self, run: Training) -> None:
        self.run = run
        run.heart.ending = self._farewell

    def meant(self, error: BaseException) -> Fault | None:
        """The fault that an exception is; None for one of ours."""
        run = self.run
        parts = parts_of(run.model, run.probes, run.hooks, run.dataset)
        return translated(error, parts, run.inside)

    def stopped(self) -> Fault:
        """A signal came: save what may be saved, unless a second one asked for haste, or replicas have drifted."""
        run = self.run
        assert run.stopping.asked is not None
        code, step = Interrupted(run.stopping.asked).code, run.engine.steps_done
        if run.together.united:
            if self._unsaved() and not run.stopping.twice:
                with contextlib.suppress(Interrupted), handled(run.stopping):
                    if (drift := self._save()) is not None:
                        return self._told(drift)
        else:
            run.heart.post("it was asked twice to stop", code)
        self._leave("preempted")
        stopped = f"stopped at step {step}; {run.saver.way_on(run.stack.registry)}"
        return Preempted(stopped, code, known=run.together.united)

    def failed(self, error: BaseException) -> Fault | None:
        """The fault that an exception is, with how to go on; None for one of ours."""
        run = self.run
        fault = self.meant(error)
        if not run.together.united:
            fault = run.heart.explained(error, fault)
        elif self._unsaved() and getattr(fault, "code", 0) != StorageFault.code:
            with contextlib.suppress(StorageFault):
                if (drift := self._save()) is not None and fault is not None:
                    fault.add_note(str(drift))
        finished = run.engine.rank == 0 and run.directory.finished
        if finished:
            way_on = "the run itself is complete"
        else:
            self._leave("failed", fault=str(fault or repr(error)))
            way_on = run.saver.way_on(run.stack.registry, fault)
        if fault is not None and way_on:
            fault.add_note(way_on)
        return fault

    def _unsaved(self) -> bool:
        """Whether what is in memory is worth a checkpoint and fit for one."""
        return not self.run.inside and self.run.engine.steps_done not in (0, self.run.saver.saved)

    def _save(self) -> Drifted | None:
        """Save with all processes, if none of them has gone meanwhile; the fault if what they hold is not the same."""
        try:
            agreement.certify(self.run.engine)
            self.run.save(last=True)
        except Drifted as drift:
            return drift
        except PeerFault:
            pass
        except RuntimeError as error:
            if not distributed.of_collective(error):
                raise
        return None

    def _told(self, fault: Fault) -> Fault:
        """Record a fault, and say how to go on."""
        self._leave("failed", fault=str(fault))
        fault.add_note(self.run.saver.way_on(self.run.stack.registry, fault))
        return fault

    def _leave(self, status: str, **more: Any) -> None:
        """Record how the run stands; of several processes each goes by itself from here on."""
        if self.run.engine.world > 1:
            deaf()
        self._mark(status, **more)

    def _mark(self, status: str, **more: Any) -> None:
        """Record how the run stands, as far as the disk lets us."""
        with contextlib.suppress(StorageFault):
            if self.run.engine.rank == 0:
                self.run.directory.mark(status, step=self.run.engine.steps_done, **more)

    def _farewell(self, text: str) -> str:
        """The heartbeat ends this process, as its main thread cannot."""
        self._mark("failed", fault=text)
        return self.run.saver.way_on(self.run.stack.registry)
