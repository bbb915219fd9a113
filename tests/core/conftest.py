"""The toys lie beside the tests that use them; two processes live as long as the session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import Pool


@pytest.fixture(scope="session")
def two() -> Iterator[Pool]:
    """Two processes over gloo: `two(function, *args)` gives the results by rank; see :class:`pool.Pool`."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Pool]:
    """Four of them, for tests marked slow."""
    pool = Pool(4)
    yield pool
    pool.close()
