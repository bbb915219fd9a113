"""The last words of a process: in full once for people to read, from the others in one line; and for torchrun."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time

_WIDEST = 200  # characters of what a process says in one line


def words(fault: BaseException, *more: str) -> str:
    """What a process says of why it ends, with its notes and ``more``.

    Under torchrun, which mixes all outputs, one line where another process says it in full: the one that failed or
    found out, and the first one of every machine.
    """
    if _known(fault) and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        line = str(fault).partition("\n")[0]
        cut = line if len(line) <= _WIDEST else f"{line[:_WIDEST]}..."
        return f"process {os.environ.get('RANK', '?')} ends too: {cut}"
    return "\n".join([str(fault), *getattr(fault, "__notes__", ()), *(line for line in more if line)])


def leave(text: str, fault: BaseException | None = None) -> None:
    """Have torchrun print a text at the end of its page, in place of advice on how to get tracebacks.

    Args:
        text: why this process ends.
        fault: why, unless nobody expected it.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    when = int(time.time()) + _known(fault)  # the earliest is the cause, and whole seconds are compared
    told = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(when)}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": told}, file)


def part() -> None:
    """End one of several processes that have done their work; gloo's threads may fail while an interpreter closes."""
    distributed = sys.modules.get("vtp_core.distributed")  # not there, nothing was joined
    if distributed is None or distributed.world_size() == 1:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _known(fault: BaseException | None) -> bool:
    """Whether another process says the same in full."""
    return bool(getattr(fault, "known", False))
