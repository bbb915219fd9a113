"""What every test lives with: one thread, no network, the same seed."""

from __future__ import annotations

import os
import sys

import pytest

# Before anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["VTP_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch where it is imported already; tests that need no torch stay fast."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
