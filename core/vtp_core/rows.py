"""How the rows of a batch are shared out to processes and micro-batches, by objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from vtp_core.errors import StackFault
from vtp_core.options import Objective
from vtp_core.stack import Stack


def check_rows(stack: Stack, world: int) -> None:
    """Refuse a batch that does not divide, before anything is built.

    Raises:
        StackFault: rows of an objective do not divide by processes and micro-batches.
    """
    written = stack.section("objectives").items()
    shares = {name: node.get("rows", Objective().rows) for name, node in written}
    rows_of(shares, stack.data.batch_size, world, stack.train.accumulate)


def rows_of(shares: Mapping[str, float], batch_size: int, world: int, accumulate: int) -> dict[str, int]:
    """Rows of one micro-batch of one process that each objective reads.

    Args:
        shares: ``rows`` by objective.
        batch_size: global.
        world: processes.
        accumulate: micro-batches.

    Raises:
        StackFault: some do not divide; the message has the nearest batch sizes for which all do.
    """
    exact, parts, found = {name: _exact(rows) for name, rows in shares.items()}, world * accumulate, {}
    for name, share in exact.items():
        rows = share * batch_size
        if rows % parts or batch_size % parts:
            step = math.lcm(
                parts, *((parts / s).numerator for s in exact.values())
            )  # parts divides s x multiples
            near = sorted({max(batch_size // step, 1) * step, (batch_size // step + 1) * step})
            raise StackFault(
                f"objectives.{name}.rows: {float(share):g} x data.batch_size {batch_size} = "
                f"{float(rows):g} rows, which do not divide by {world} processes x {accumulate} "
                f"micro-batches; use data.batch_size={' or '.join(map(str, near))}"
            )
        found[name] = int(rows) // parts
    return found


def _exact(rows: float) -> Fraction:
    """``rows`` as a fraction: 0.333 means a third."""
    near = Fraction(rows).limit_denominator(128)
    return near if abs(near - rows) < 2e-3 * rows else Fraction(rows).limit_denominator(1_000_000)
