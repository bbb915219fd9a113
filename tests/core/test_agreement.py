"""Replicas hold the same bits, and one that does not is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import batch_of, engine_of
from two import OBJECTIVES, SECTIONS

from vtp_core import agreement
from vtp_core.agreement import Drifted, hashes

EVERY: dict[str, Any] = {"check_every": 2, "checkpoint_every": 20, **SECTIONS["train"]}
TRAINED = ("tokenizer", "encoder.embed.weight")
CENTRE = ("objectives/distil", "centre")
TAUGHT = ("teacher", "encoder.embed.weight")


def flipped(part: str, key: str, world: int = 2, parallel: str = "replicated") -> list[str]:
    """What is found after each of four steps when a bit of the last process flips after the third."""
    engine = engine_of(OBJECTIVES, batch=16, **{**SECTIONS, "train": {**EVERY, "parallel": parallel}})
    found = []
    for step in range(4):
        engine.step(batch_of(engine, step))
        if step == 2 and dist.get_rank() == world - 1:
            value = engine.state()[part][key]
            value.view(-1)[3:4].view(torch.int64).bitwise_xor_(1 << 30)  # the last ones may heal by rounding
        try:
            agreement.check(engine)
            found.append("")
        except Drifted as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("place", "parallel"),
    [
        (TRAINED, "replicated"),
        (CENTRE, "replicated"),
        (TAUGHT, "replicated"),
        (CENTRE, "fsdp2"),
    ],
)
def test_a_flipped_bit_is_found_at_the_next_check(two: Pool, place: tuple[str, str], parallel: str) -> None:
    first, second = two(flipped, *place, 2, parallel)
    assert first == second
    assert first[:3] == ["", "", ""]
    assert first[3].startswith(f"step 4: the processes differ in {'/'.join(place)}")
    assert "resume from the last checkpoint" in first[3]


@pytest.mark.slow
def test_of_four_processes_the_one_that_drifted_is_named(four: Pool) -> None:
    found = four(flipped, *TRAINED, 4)
    assert all(words[3].startswith("step 4: process 3 differs in tokenizer/encoder") for words in found)


def test_any_bit_of_any_dtype_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        value = torch.randn(500, generator=generator).to(dtype)
        seen = {int(hashes([value])[0])}
        words = value.view(agreement._WORDS[value.element_size()])
        for place in range(500):
            words[place] ^= 1
            seen.add(int(hashes([value])[0]))
            words[place] ^= 1
        assert len(seen) == 501
        assert int(hashes([value])[0]) in seen


def test_places_and_chunks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(1000, dtype=torch.float64)
    whole, turned = hashes([value, value.flip(0)])
    assert whole != turned
    monkeypatch.setattr(agreement, "_CHUNK", 7)
    assert torch.equal(hashes([value]), whole[None])


def test_one_process_has_nobody_to_compare_with() -> None:
    engine = engine_of({"rebuild": {}}, train={"check_every": 1})
    engine.step(batch_of(engine))
    agreement.check(engine)
