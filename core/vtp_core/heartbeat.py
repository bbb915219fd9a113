"""A sign of life from every process each second: who died or hangs is named, and nobody waits for it for ever."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from vtp_core import distributed, farewell, suspects
from vtp_core.attribution import translated
from vtp_core.errors import Fault
from vtp_core.peers import PULSE, Beat, Verdict
from vtp_core.stopping import ECHO, SIGNALS
from vtp_core.whereabouts import look

T = TypeVar("T")
BEAT = 1.0  # seconds between two signs of life
STALE = 3.0  # seconds without one, after which a process counts as dead
GRACE = 10.0  # seconds in which a process may come to an agreement by itself once it must end
HASTE = 3.0  # the same where it is known that it cannot, or where it was asked twice
LINGER = 5.0  # seconds that the others have to read why the keeper of the store goes
_TICK = 0.25
_ANSWER = 3.0  # seconds that the store has to answer
_HEARTS = itertools.count()  # a process may train several times; each run has keys of its own


class Heart:
    """The heartbeat of this process in a run of several; with one process it does nothing.

    Two daemon threads: one writes to the store, which may not answer; the other ends this process where its main
    thread can't, as inside a collective that nobody else will enter or on a device that waits for one.

    Args:
        timeout: seconds that a collective may take.
        slack: seconds that the collective has to end by itself after that; NCCL's would end the process.

    Attributes:
        calm: whether the main thread ends the run itself, so that only the time-out is watched.
        ending: told why the process is ended from its thread; returns the last line of the message.
    """

    def __init__(self, timeout: float, slack: float = 5.0) -> None:
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.patience, self.calm = timeout + slack, False
        self.ending: Callable[[str], str] = lambda text: ""
        self._verdict: Verdict | None = None
        self._seen = self._asked = self._again = float("inf")  # when the verdict, a signal, another one came
        self._due = float("inf")  # when to see whether the signal has had its effect
        self._main, self._at = threading.get_ident(), ("", False)
        self._lost, self._dead = False, list[int]()
        self._keeper = self.rank == 0 and not distributed.launched()  # of the store
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        if self.world > 1:
            self._store = PrefixStore(f"heart-{next(_HEARTS)}", _get_default_store())
            self._listen()
            for work in (self._beating, self._watching):
                self._threads.append(threading.Thread(target=work, name=work.__name__, daemon=True))
                self._threads[-1].start()

    def _listen(self) -> None:
        """Have signals told to a thread too: the main one does not hear them inside a collective."""
        self._ears, self._wakeup, self._before = -1, -1, -1
        if threading.current_thread() is threading.main_thread():
            self._ears, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

    def stop(self) -> None:
        """This process leaves the others, which need not wait for it."""
        if self._ended.is_set() or not self._threads:
            return
        self._ended.set()
        for thread in self._threads:
            thread.join(_ANSWER)
        self._linger()
        if self._ears >= 0:
            signal.set_wakeup_fd(self._before)
            os.close(self._ears)
            os.close(self._wakeup)

    def _linger(self) -> None:
        """Keep the store a little longer, for the others to read why this process goes."""
        until = time.monotonic() + LINGER
        while self._keeper and time.monotonic() < until:
            beats = self._beats() or {}
            others = [beat for rank, beat in beats.items() if rank not in (self.rank, *self._dead)]
            if all(beat is not None and (beat.left or beat.told) for beat in others):
                return
            time.sleep(0.1)

    # ---- what a process tells and asks

    @contextlib.contextmanager
    def guarding(self) -> Iterator[None]:
        """Tell the others what is raised here; where they are the cause, raise what they tell."""
        try:
            yield
        except Exception as error:
            fault = self.explained(error, translated(error))
            self.stop()
            if fault is None or fault is error:
                raise
            raise fault from error
        except BaseException as error:
            code = getattr(error, "code", None)
            self.post(str(error), code if isinstance(code, int) else 75)
            self.stop()
            raise

    def explained(self, error: BaseException, fault: Fault | None) -> Fault | None:
        """The fault behind an exception that this process met alone: its own, which the others get to know, or theirs.

        Args:
            error: what was raised.
            fault: what it is, should it be this process's own.
        """
        if self.world == 1:
            return fault
        self.calm = True
        if distributed.of_collective(error):
            return self._found().for_peer(self.rank)
        code = 1 if fault is None else fault.code
        self.post(str(fault or f"unexpected {type(error).__name__}: {error}"), code)
        return fault

    def post(self, text: str, code: int, own: bool = True) -> Verdict:
        """Say why this process ends; returns the verdict that holds, which another may have posted before."""
        verdict = Verdict(self.rank, text, code, own)
        if self.world > 1:
            said = json.dumps(asdict(verdict))
            held = self._ask(lambda store: store.compare_set("verdict", "", said))
            verdict = Verdict(**json.loads(held)) if held else verdict
        return verdict

    def _found(self) -> Verdict:
        """Why a collective failed: what another process has posted, or who died or hangs."""
        if self._verdict is not None:
            return self._verdict
        held = self._ask(lambda store: store.get("verdict") if store.check(["verdict"]) else b"")
        if held:
            return Verdict(**json.loads(held))
        return self.post(self.diagnosis(), 75, own=False)

    def diagnosis(self) -> str:
        """Who died or hangs, by two looks at everybody's signs of life."""
        first = self._beats()
        if first is not None:
            time.sleep(STALE)
        second = self._beats()
        if first is None or second is None:
            return self._unkept()
        self._dead = suspects.dead(self.rank, first, second)
        return suspects.named(self.rank, first, second)

    def _unkept(self) -> str:
        keeper = "the launcher" if distributed.launched() else "process 0"
        return (
            f"{keeper}, which keeps the store of the run, does not answer: it is dead or stopped; "
            f"process {self.rank} is {PULSE.doing}"
        )

    def _beats(self) -> dict[int, Beat | None] | None:
        """Everybody's last sign of life, None from who never gave one; None if the store does not answer."""

        def read(store: Store) -> dict[int, Beat | None]:
            keys = [f"beat/{rank}" for rank in range(self.world)]
            known = [rank for rank, key in enumerate(keys) if store.check([key])]
            values = store.multi_get([keys[rank] for rank in known])
            found: dict[int, Beat | None] = dict.fromkeys(range(self.world))
            return found | {r: Beat(**json.loads(v)) for r, v in zip(known, values, strict=True)}

        return self._ask(read)

    def _ask(self, question: Callable[[Any], T]) -> T | None:
        """Ask the store over a connection of its own; None if its keeper does not answer, now or before."""
        found = None if self._lost else _within(_ANSWER, lambda: question(self._store.clone()))
        self._lost = self._lost or found is None
        return found

    # ---- the threads

    def _beating(self) -> None:
        try:
            self._beat_on(self._store.clone())
        except RuntimeError:  # without its keeper nobody can be told anything
            self._lost = True  # a launcher's end is seen elsewhere
            if self._verdict is None and not distributed.launched():
                found = Verdict(self.rank, self._unkept(), 75, own=False)
                self._seen, self._verdict = time.monotonic(), found

    def _beat_on(self, store: Store) -> None:
        host = socket.gethostname()
        for number in itertools.count():
            left = self._ended.is_set()
            idle = time.monotonic() - PULSE.since
            if self._verdict is None and store.check(["verdict"]):
                self._seen, self._verdict = time.monotonic(), Verdict(**json.loads(store.get("verdict")))
            if not self.calm:  # else it has come out of the collective, and looks who did not come
                self._at = look(self._main)
            where, waits = self._at
            beat = Beat(
                number, PULSE.doing, PULSE.collectives, idle, host, PULSE.brief, where, waits or self.calm, left,
                told=self._verdict is not None,
            )  # fmt: skip
            store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))
            if left:
                return
            self._ended.wait(BEAT)

    def _watching(self) -> None:
        while not self._ended.wait(_TICK):
            self._hear()
            if self._parent and os.getppid() != self._parent:
                self._parent = 0
                os.kill(os.getpid(), signal.SIGTERM)  # the launcher has gone, and nobody looks after this run
            if self._verdict is not None and not self.calm:
                grace = GRACE if self._verdict.own else HASTE
                if time.monotonic() - self._seen > grace:
                    self._leave(self._verdict)
            elif self._hangs():
                self._leave(self.post(self.diagnosis(), 75, own=False))

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._ears, 64) if self._ears >= 0 else b"":
                now = time.monotonic()
                if number in SIGNALS:
                    self._asked, self._due = min(self._asked, now), min(self._due, now + GRACE)
                    if now > self._asked + ECHO:
                        self._again = min(self._again, now)

    def _hangs(self) -> bool:
        """Whether nothing has moved for too long, once the run is asked to stop or where others are waited for.

        A save and a measurement may take their time after a signal, here and where others wait for them.
        """
        now = time.monotonic()
        idle = now - PULSE.since
        if PULSE.limited and idle > self.patience:
            return True
        if now - self._again > HASTE and idle > HASTE:
            return True
        if self.calm or not PULSE.brief or now < self._due or idle < max(GRACE, 2 * PULSE.longest):
            return False
        self._due = now + GRACE
        return all(beat.brief for beat in suspects.hanging(self._beats() or {}).values())

    def _leave(self, verdict: Verdict) -> None:
        """End this process from its thread, as its main thread can't."""
        if self._ended.is_set():
            return
        self._ended.set()
        fault = verdict.for_peer(self.rank) if verdict.rank != self.rank else Fault(verdict.text)
        text = farewell.words(fault, _within(_ANSWER, lambda: self.ending(str(fault))) or "")
        os.write(2, f"vtp: {text}\n".encode())
        farewell.leave(f"vtp: {text}", fault)
        for child in multiprocessing.active_children():
            child.kill()
        self._linger()
        os._exit(verdict.code)


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """What ``work`` returns; None if it takes longer or fails as stores do."""
    answers: queue.SimpleQueue[T] = queue.SimpleQueue()

    def run() -> None:
        with contextlib.suppress(RuntimeError, Fault):
            answers.put(work())

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None
