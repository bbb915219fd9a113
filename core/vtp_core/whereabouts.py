"""Where a thread is: in whose code, and whether it waits there for other processes."""

from __future__ import annotations

import os
import sys

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_COLLECTIVES = _TORCH + "distributed" + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_INSTALLED = ("site-packages", "dist-packages")  # may lie in Python's own folder


def look(thread: int) -> tuple[str, bool]:
    """The innermost line that is neither torch's nor Python's own, and whether a collective is entered from it.

    Sources are not read: a disk that hangs would hold up the one who looks.

    Args:
        thread: identifier of a living thread, as of ``threading.get_ident``.

    Returns:
        "mishaps.py line 23 (_sleep)", empty of a thread without such a line; and whether ``torch.distributed``,
        as for a collective of FSDP2, was called there. Collectives of NCCL return before they are done.
    """
    frame, waits = sys._current_frames().get(thread), False
    while frame is not None:
        path = frame.f_code.co_filename
        if not _foreign(path):
            return f"{os.path.basename(path)} line {frame.f_lineno} ({frame.f_code.co_qualname})", waits
        waits = waits or path.startswith(_COLLECTIVES)
        frame = frame.f_back
    return "", waits


def _foreign(path: str) -> bool:
    """Whether code is torch's or Python's own, or made while it runs."""
    own = path.startswith(_PYTHON) and not any(folder in path for folder in _INSTALLED)
    return own or path.startswith((_TORCH, "<"))
