"""One process per run directory: a lock that its owner's death releases."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from vtp_core.errors import StackFault, StorageFault
from vtp_core.run.files import reason, write_all

PATIENCE = 2.0  # seconds


class Lock:
    """Exclusive use of a run directory.

    ``flock`` decides on one machine, and the kernel drops it however its owner ends. The record (pid,
    host, boot id, start of the process, launcher's job) names the owner to others, and decides where a network file
    system knows no locks between machines.

    Args:
        path: the lock file, made if absent. It is never removed: two processes must meet on one inode.
        job: name of everything that this process's launcher starts. An owner of the same job was of an earlier
            attempt, all of which died before this one began.

    Raises:
        StackFault: another process has the run.
        StorageFault: the lock cannot be written.
    """

    def __init__(self, path: Path, job: str | None = None) -> None:
        self._handle: int | None = None
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageFault(f"{path} cannot be opened: {reason(error)}") from error
        try:
            owned = _patient(handle, _record(handle), job)
            record = _record(handle)
            if owned is False or _may_live(record, job, trust=owned is True):
                raise StackFault(_busy(path, record))
            os.ftruncate(handle, 0)
            write_all(handle, json.dumps(_own_record(job)).encode())
        except OSError as error:
            os.close(handle)
            raise StorageFault(f"{path} cannot be written: {reason(error)}") from error
        except StackFault:
            os.close(handle)
            raise
        self._handle = handle
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.release)

    def release(self) -> None:
        """Let the next process in."""
        atexit.unregister(self.release)
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            self._forget()

    def _forget(self) -> None:
        """Close the file; in a forked child too, or a worker that outlives its owner would keep the lock."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _patient(handle: int, record: dict[str, Any], job: str | None) -> bool | None:
    """:func:`_flock`, tried for a while if the owner is dead: a worker it was just starting may not have let go."""
    until = time.monotonic() + PATIENCE
    while (owned := _flock(handle)) is False and record and not _may_live(record, job, trust=False):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return owned


def _flock(handle: int) -> bool | None:
    """True: ours; False: somebody else's; None: this file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _own_record(job: str | None = None) -> dict[str, Any]:
    pid = os.getpid()
    host = socket.gethostname()
    return {"pid": pid, "host": host, "boot": _boot(), "started": _started(pid), "job": job}


def _record(handle: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _may_live(record: dict[str, Any], job: str | None, trust: bool) -> bool:
    """Whether the recorded owner may be alive; ``trust``: its lock was free, so on this machine it is not."""
    if not record or (job is not None and record.get("job") == job):
        return False
    if record.get("boot") == _boot():
        pid = record.get("pid")
        return not trust and isinstance(pid, int) and _started(pid) == record.get("started")
    return record.get("host") != socket.gethostname()


def _busy(path: Path, record: dict[str, Any]) -> str:
    owner = f"process {record['pid']} on {record.get('host')}" if "pid" in record else "another process"
    elsewhere = record.get("boot") != _boot() and record.get("host") != socket.gethostname()
    remedy = f"; if that process is gone, remove {path}" if record and elsewhere else ""
    return f"{path.parent} is in use by {owner}\nwait for it to end, or choose another run.dir{remedy}"


def _boot() -> str | None:
    """Identity of this boot of this machine; None where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot, as a pid may be taken again; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # the name before may hold spaces and parentheses
