"""Whether replicas still hold the same bits: every process hashes its state, and a drift is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vtp_core import distributed, options
from vtp_core.errors import Fault
from vtp_core.peers import PULSE
from vtp_core.shards import is_shard

if TYPE_CHECKING:
    from vtp_core.engine import Engine

_CHUNK = 2**22  # numbers that are hashed at a time
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # its multiples are spread evenly over 64 bits
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Drifted(Fault):
    """Processes that must hold the same state do not; what is in memory is not worth saving."""

    code = 75


def check(engine: Engine) -> None:
    """Compare the state of all processes, if it is time; every one of them must call this.

    Every ``train.check_every`` steps, 0 for never, and wherever a checkpoint is due, so that none holds what
    has drifted.

    Raises:
        Drifted: on every process, if any tensor differs anywhere by a single bit.
    """
    keys, step = engine.train_keys, engine.steps_done
    every, saved = (options.steps_of(key, keys.steps) for key in (keys.check_every, keys.checkpoint_every))
    if every and (step % every == 0 or step % max(saved, 1) == 0 or step == keys.steps):
        certify(engine)


def certify(engine: Engine) -> None:
    """Compare the state of all processes now, before it is saved; nothing where ``train.check_every`` is 0."""
    if engine.world > 1 and engine.train_keys.check_every:
        compare(engine.state(), engine.steps_done)


def compare(parts: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Raise :class:`Drifted` if any tensor of ``parts`` is not the same on all processes; shares of one need not be."""
    found = {f"{part}/{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
    named = {name: value for name, value in found.items() if not is_shard(value)}
    ours = hashes(list(named.values()))
    everyone = [torch.empty_like(ours) for _ in range(distributed.world_size())]
    with PULSE.collective():
        dist.all_gather(everyone, ours)
    table = torch.stack(everyone).cpu()  # (W, tensors)
    unequal = (table != table[0]).any(0).nonzero().flatten().tolist()
    if unequal:
        raise Drifted(
            _message([list(named)[index] for index in unequal], table[:, unequal[0]].tolist(), step)
        )


def hashes(tensors: list[Tensor]) -> Tensor:
    """64 bits of each tensor, (n,) int64 on the first one's device; a single number that differs always shows.

    The sum, modulo 2^64, of each number's bits times an odd factor of its place.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    found = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    for index, tensor in enumerate(tensors):
        for words, start in _words(tensor.detach()):
            factors = (
                torch.arange(start, start + len(words), device=words.device).mul_(_GOLDEN).bitwise_or_(1)
            )
            found[index] += factors.mul_(words).sum().to(device)
    return found


def _words(tensor: Tensor) -> list[tuple[Tensor, int]]:
    """The raw bits of a tensor as int64, in chunks, and where each begins."""
    whole = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = whole.contiguous().view(-1).view(_WORDS[whole.element_size()])
    return [(part.long(), index * _CHUNK) for index, part in enumerate(flat.split(_CHUNK))]


def _message(names: list[str], of_first: list[int], step: int) -> str:
    """Who differs from the majority; of two that differ nobody knows who is right."""
    most, count = Counter(of_first).most_common(1)[0]
    apart = [rank for rank, value in enumerate(of_first) if value != most]
    who = f"process {', '.join(map(str, apart))}" if 2 * count > len(of_first) else "the processes"
    verb = "differs" if len(apart) == 1 and who != "the processes" else "differ"
    more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
    return (
        f"step {step}: {who} {verb} in {names[0]}{more}, which must be the same everywhere: memory or a network "
        "has failed, or an objective settles by process\n"
        "resume from the last checkpoint, which gives all processes one state; if it comes again, leave that "
        "machine out, or run check_objective on the objectives"
    )
