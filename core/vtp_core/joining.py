"""How the processes of a run meet: who is there is agreed upon anew whenever a launcher starts them again."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from vtp_core.errors import StackFault
from vtp_core.peers import PeerFault

ARRIVAL = 300.0  # seconds that a start may take at least: machines read libraries at different speeds
SAY, AGAIN = 10.0, 60.0  # seconds until people are told who is waited for, and until they are told again
_TURN = 1.0  # seconds that one try to connect may take, in which C code may not hear signals


@dataclass(frozen=True)
class Attempt:
    """One start of all processes, as the first process describes it to each.

    Attributes:
        store: of the launcher, or of the first process.
        name: of this attempt; what it keeps in the store goes under it, apart from the keys of the dead.
        number: of attempts before it that met.
        job: name of everything that this launcher starts.
        runs: directories by number of the run, those of earlier attempts first.
        made: numbers of runs that an earlier attempt began; other directories were only claimed.
    """

    store: Store
    name: str
    number: int
    job: str
    runs: dict[str, str]
    made: list[str]

    @property
    def own(self) -> Store:
        """The part of the store that is this attempt's."""
        return PrefixStore(self.name, self.store)

    def remember(self, number: int, run: str) -> None:
        """Leave a run's directory in the store for the attempts to come; only the first process does."""
        self.runs[str(number)] = run
        self.store.set("runs", json.dumps(self.runs))


def place() -> tuple[int, int]:
    """Rank and number of processes, as the launcher says; 0 and 1 without one.

    Raises:
        StackFault: a variable is missing, no whole number, or out of range.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    world = whole("WORLD_SIZE")
    if world < 1:
        raise StackFault(f"WORLD_SIZE={world} in the environment: there must be at least 1 process")
    rank = whole("RANK") if world > 1 or "RANK" in os.environ else 0
    if not 0 <= rank < world:
        raise StackFault(
            f"RANK={rank} in the environment: with WORLD_SIZE={world} it goes from 0 to {world - 1}"
        )
    return rank, world


def whole(name: str) -> int:
    """A launcher's variable as a number."""
    text = variable(name)
    try:
        return int(text)
    except ValueError:
        raise StackFault(
            f"{name}={text!r} in the environment is no whole number; a launcher sets it"
        ) from None


def variable(name: str) -> str:
    """A launcher's variable; a :class:`StackFault` names one that is missing."""
    if name not in os.environ:
        raise StackFault(
            f"WORLD_SIZE is set in the environment, {name} is not; start several processes with: "
            "torchrun --nproc-per-node N -m vtp_core train STACK"
        )
    return os.environ[name]


def launched() -> bool:
    """Whether a launcher outlives the processes and keeps a store for them."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join(rank: int, world: int, timeout: float) -> Attempt:
    """Meet the other processes at ``MASTER_ADDR:MASTER_PORT``.

    A launcher may start processes again on each machine by a count of its own, and its store still has the words
    of the dead. So every process says a fresh name; the first one calls all by theirs; an answer to a call with
    one's own name comes from nobody dead.

    Raises:
        PeerFault: some processes did not come within ``timeout`` seconds, or 300 if that is more.
    """
    wait = _Wait(world, max(timeout, ARRIVAL))
    store = PrefixStore("vtp", _connected(rank == 0 and not launched(), wait))
    own = uuid.uuid4().hex
    attempt = _first(store, own) if rank == 0 else {}
    store.set(f"hello/{rank}", own)
    while True:
        if rank == 0 and (names := _names(store, world)) != attempt.get("names"):
            attempt["names"] = names
            store.set("attempt", json.dumps(attempt))
        if (called := _called(store, own)) and _complete(store, called, own, rank):
            return Attempt(store, **{key: called[key] for key in ("name", "number", "job", "runs", "made")})
        wait.turn(partial(_absent, store, called))


def _first(store: Store, own: str) -> dict[str, Any]:
    """What the first process knows of an attempt before it knows who is there."""
    job, runs = _said(store, "job") or own, json.loads(_said(store, "runs") or "{}")
    store.set("job", job)
    made = [number for number, run in runs.items() if (Path(run) / "run.json").is_file()]
    return {"name": own, "number": store.add("attempts", 1) - 1, "job": job, "runs": runs, "made": made}


def _said(store: Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None  # get() would wait for it


def _names(store: Store, world: int) -> list[str | None]:
    keys = [f"hello/{rank}" for rank in range(world)]
    if store.check(keys):
        return [name.decode() for name in store.multi_get(keys)]
    return [_said(store, key) for key in keys]


def _called(store: Store, own: str) -> dict[str, Any] | None:
    """The attempt that calls this process, if one does."""
    attempt: dict[str, Any] = json.loads(_said(store, "attempt") or "{}")
    return attempt if own in attempt.get("names", []) else None


def _complete(store: Store, attempt: dict[str, Any], own: str, rank: int) -> bool:
    """Answer to a call; the first process says when all have."""
    go = f"{attempt['name']}/go"
    store.set(_answer(attempt, own), "")
    names = attempt["names"]
    if rank == 0 and all(names) and store.check([_answer(attempt, name) for name in names]):
        store.set(go, "")
    return bool(store.check([go]))


def _answer(attempt: dict[str, Any], name: str) -> str:
    return f"{attempt['name']}/here/{name}"


def _absent(store: Store, attempt: dict[str, Any] | None) -> list[int]:
    """Who has not answered; the first process where nobody calls."""
    if attempt is None:
        return [0]
    answers = [name and _answer(attempt, name) for name in attempt["names"]]
    return [rank for rank, answer in enumerate(answers) if not answer or not store.check([answer])]


def _connected(keeper: bool, wait: _Wait) -> Store:
    """The store; tried with a plain socket first, as TCPStore waits in C++, where no signal is heard."""
    address, port = variable("MASTER_ADDR"), whole("MASTER_PORT")
    if not 0 < port < 2**16:
        raise StackFault(f"MASTER_PORT={port} in the environment: a port is between 1 and {2**16 - 1}")
    while not keeper:
        try:
            socket.create_connection((address, port), timeout=_TURN).close()
            break
        except OSError as error:
            wait.turn(lambda: [0], str(error))
    try:
        store: Store = TCPStore(
            address, port, is_master=keeper, timeout=timedelta(seconds=wait.patience), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except RuntimeError as error:
        raise StackFault(
            f"process 0 cannot listen at MASTER_ADDR:MASTER_PORT, {address}:{port}: {str(error).splitlines()[0]}\n"
            "choose another MASTER_PORT, the same for all processes"
        ) from error
    return store


class _Wait:
    """Turns of waiting, between which signals are heard."""

    def __init__(self, world: int, patience: float) -> None:
        self.world, self.patience = world, patience
        self._began, self._nap = time.monotonic(), 0.02
        self._say = self._began + SAY

    def turn(self, absent: Callable[[], list[int]], why: str = "") -> None:
        """Wait a moment; tell people after a while for whom, and give up in the end.

        Args:
            absent: which processes are waited for; asked only to be told, as it takes a question for each.
            why: what a try to connect said.
        """
        now = time.monotonic()
        if now > min(self._say, self._began + self.patience):
            self._tell(now, absent(), f" ({why})" if why else "")
        time.sleep(self._nap)
        self._nap = min(2 * self._nap, 0.5)

    def _tell(self, now: float, absent: list[int], because: str) -> None:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        whom = f"process {', '.join(map(str, absent))} of {self.world}"
        if now > self._began + self.patience:
            raise PeerFault(
                f"{whom} did not come to {place} within {self.patience:.0f} s{because}\n"
                "start all processes again, each with the MASTER_ADDR and MASTER_PORT of process 0",
                75,
            )
        self._say = now + AGAIN
        print(f"vtp: waiting for {whom} at {place}{because}", file=sys.stderr, flush=True)
