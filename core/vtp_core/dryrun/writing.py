"""How large a checkpoint is, and whether it can be written before a launcher ends the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RATE = 500e6  # bytes a second that are assumed to be written, read again and hashed
GRACE = 30.0  # seconds that torchrun waits after SIGTERM, unless told otherwise


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one process writes, and all together.

    Attributes:
        parts: bytes by part, of the first process.
        processes: that write.
        whole: bytes of all of them.
    """

    parts: Mapping[str, int]
    processes: int
    whole: int

    @property
    def own(self) -> int:
        """Bytes that the first process writes."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Time of a save: processes write side by side."""
        return self.own / RATE

    @property
    def advice(self) -> str:
        """What to do where a save outlasts the grace period; empty where it does not."""
        if self.seconds <= GRACE:
            return ""
        shards = (
            "" if self.processes > 1 else ", or train.parallel=fsdp2, where every process writes its part"
        )
        return f"start it with torchrun --shutdown-timeout {round(2 * self.seconds, -1):.0f}{shards}"
