"""The engine of vtp-plugins. Exports are lazy, so that a command that needs no torch does not import it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtp_core.beginning import train as train
    from vtp_core.describe import plan as plan
    from vtp_core.generation import Generator as Generator
    from vtp_core.stack import load_stack as load_stack
    from vtp_core.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "Generator": "generation",
    "Tokenizer": "tokenizer",
    "load_stack": "stack",
    "plan": "describe",
    "train": "beginning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtp_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vtp_core.{_HOME[name]}"), name)
