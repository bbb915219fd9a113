"""What a run says of its processes before the first step: how the batch is split, and who holds which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtp_core.engine import Engine


def announced(engine: Engine) -> list[str]:
    """Lines for people; none for one process with one micro-batch, which splits nothing."""
    micros, batch, parallel = engine.layout.accumulate, engine.layout.batch_size, engine.train_keys.parallel
    lines = []
    if engine.world * micros > 1:
        rows = batch // (engine.world * micros)
        backend = "nccl" if engine.device.type == "cuda" else "gloo"
        several = f"{engine.world} processes ({backend}, {parallel})" if engine.world > 1 else "1 process"
        batches = f"{micros} micro-batches" if micros > 1 else "1 micro-batch"
        lines.append(f"{several} x {rows} rows x {batches} = batch_size {batch}")
    if parallel == "fsdp2":
        lines.append(_dealt(engine))
    return lines


def _dealt(engine: Engine) -> str:
    """Which modules are dealt, and why others are not."""
    roots = engine.sharding.roots
    whole = engine.sharding.whole | {f"teachers/{name}": "is frozen" for name in engine.model.teachers}
    if engine.world == 1:
        return "train.parallel=fsdp2: one process holds all weights; nothing is dealt"
    named = f"fsdp2 deals {', '.join(roots)}" if roots else "fsdp2 deals nothing"
    kept = [f"{name} ({why})" for name, why in whole.items()]
    return f"{named}; whole in every process: {', '.join(kept)}" if kept else named
