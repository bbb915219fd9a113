"""The loader: one order for any number of workers and processes, bad samples bounded, no row in vain."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from vtp_core.data.loader import Loader
from vtp_core.data.order import permutation
from vtp_core.data.pictures import BadSample
from vtp_core.data.steps import Batch
from vtp_core.data.views import Crops, Plain
from vtp_plugins.errors import DataFault
from vtp_plugins.protocols import Dataset

VIEWS = {"plain": Plain(size=8, flip=0.5), "two": Crops(size=8, blur_taps=3)}
ROWS = {"plain": 8, "two": 4, "text": 8, "label": 8}


class Toy:
    """Pictures of one colour each; some broken, some without a caption."""

    fields = frozenset({"image", "text", "label", "name"})
    provides: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ("train",)
    names: Mapping[str, Sequence[str]] = {}

    def __init__(self, count: int = 40, broken: Sequence[int] = (), mute: Sequence[int] = ()) -> None:
        self.count, self.broken, self.mute = count, set(broken), set(mute)
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads.append(index)
        if index in self.broken:
            raise BadSample("truncated", f"{index}.png", "half a file")
        image = torch.arange(300).view(3, 10, 10).add(index).remainder(256).to(torch.uint8)
        text = None if index in self.mute else f"number {index}"
        return {"image": image, "text": text, "label": index % 5, "name": f"{index}.png"}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return permutation(self.count, seed, epoch)

    def fingerprint(self) -> str:
        return "toy"


class Faltering(Toy):
    """One sample cannot be read the first time."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3 and index not in self.reads:
            self.reads.append(index)
            raise self.error
        return super().__getitem__(index)


def caused(cause: OSError) -> BadSample:
    error = BadSample("cannot be read", "3.png")
    error.__cause__ = cause
    return error


def loader(dataset: Dataset | None = None, **options: Any) -> Loader:
    options = {"views": VIEWS, "rows": ROWS, "batch_size": 8, "stop": 6, **options}
    return Loader(Toy() if dataset is None else dataset, **options)


def same(a: Batch, b: Batch) -> bool:
    tensors = [k for k, v in a.values.items() if isinstance(v, torch.Tensor)]
    return (
        a.step == b.step
        and torch.equal(a.ids, b.ids)
        and all(torch.equal(a.values[k], b.values[k]) for k in tensors)
        and a.values["text"] == b.values["text"]
    )


def test_a_batch_holds_stacked_views_and_raw_fields_for_the_rows_asked() -> None:
    batch = next(iter(loader()))
    assert batch.values["plain"].shape == (8, 1, 3, 8, 8)
    assert batch.values["two"].shape == (4, 2, 3, 8, 8)
    assert batch.values["label"].tolist() == [int(i) % 5 for i in batch.ids]
    assert batch.values["text"] == [f"number {i}" for i in batch.ids.tolist()]


def test_a_sample_is_read_once_and_only_if_its_row_is_read() -> None:
    toy = Toy()
    batch = next(iter(loader(toy, rows={"two": 3, "plain": 0, "label": 2})))
    assert toy.reads == batch.ids.tolist()
    assert len(toy.reads) == 3
    assert set(batch.values) == {"two", "label"}


def test_epochs_visit_every_sample_once() -> None:
    ids = torch.cat([b.ids for b in loader(rows={"label": 8}, stop=10)]).tolist()
    assert sorted(ids[:40]) == sorted(ids[40:]) == list(range(40))
    assert ids[:40] != ids[40:]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    toy = Toy(broken=[3, 4], mute=[5])
    options: dict[str, Any] = {"required": frozenset({"text"}), "max_bad_fraction": 1.0}
    here, there = loader(toy, **options), loader(toy, workers=workers, **options)
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert here.bad == there.bad
    assert here.quarantine == there.quarantine
    assert here.read == there.read


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_out_the_same_rows(world: int) -> None:
    whole = list(loader())
    rows = {name: count // world for name, count in ROWS.items()}
    parts = [list(loader(rows=rows, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(whole):
        for rank in range(world):
            part = parts[rank][step]
            assert torch.equal(part.ids, batch.ids[rank::world])
            assert torch.equal(part.values["plain"], batch.values["plain"][rank::world])
            assert torch.equal(part.values["two"], batch.values["two"][rank::world])


def test_a_later_start_continues_the_same_batches() -> None:
    assert all(same(a, b) for a, b in zip(list(loader())[4:], loader(start=4), strict=True))


def test_views_differ_between_epochs_views_and_seeds_and_leave_the_generator_alone() -> None:
    dataset = Toy(count=1)
    views = {"a": Crops(size=8, blur_taps=3), "b": Crops(size=8, blur_taps=3)}
    before = torch.get_rng_state()
    batches = list(Loader(dataset, views, {"a": 1, "b": 1}, batch_size=1, stop=2))
    assert torch.equal(before, torch.get_rng_state())
    made = [batch.values[name] for batch in batches for name in ("a", "b")]
    made.append(next(iter(Loader(dataset, views, {"a": 1}, batch_size=1, seed=1))).values["a"])
    assert all(not torch.equal(made[i], made[j]) for i in range(5) for j in range(i))


def test_broken_samples_are_replaced_counted_and_named() -> None:
    toy = Toy(broken=[3, 17])
    batches = list(used := loader(toy, stop=5, max_bad_fraction=1.0))
    ids = torch.cat([b.ids for b in batches]).tolist()
    assert len(ids) == 40
    assert not {3, 17} & set(ids)
    assert used.bad == {"truncated": sum(len(b.skipped) for b in batches)}
    assert set(used.quarantine) == {"3.png", "17.png"}
    assert "half a file" in used.quarantine["3.png"]
    again = [b.ids for b in loader(toy, stop=5, start=2, max_bad_fraction=1.0)]
    assert all(torch.equal(a, b.ids) for a, b in zip(again, batches[2:], strict=True))


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (lambda: OSError("timed out"), True),
        (lambda: caused(OSError(5, "Input/output error")), True),
        (lambda: caused(OSError("image file is truncated")), False),
        (lambda: BadSample("truncated", "3.png"), False),
    ],
    ids=["raised", "behind it", "a decoder's", "broken"],
)
def test_a_read_that_failed_is_tried_again_and_a_broken_sample_is_not(
    error: Callable[[], Exception], again: bool
) -> None:
    toy = Faltering(error())
    ids = torch.cat([b.ids for b in loader(toy, stop=10, max_bad_fraction=1.0)]).tolist()
    assert 3 not in ids[:40]
    assert (3 in ids[40:]) is again


def test_too_many_broken_samples_stop_the_run_after_a_thousand() -> None:
    counted = loader(Toy(count=200, broken=[9]), rows={"label": 100}, batch_size=100, stop=None)
    with pytest.raises(
        DataFault, match=r"of \d+ samples read are broken.*max_bad_fraction=0.001.*9.png"
    ) as fault:
        for _ in counted:
            pass
    assert fault.value.code == 4
    assert 1000 <= counted.read < 1110


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_is_broken_altogether_stops_at_once(workers: int) -> None:
    with pytest.raises(DataFault, match=r"none of 12 samples is usable.*truncated: 12.*half a file"):
        next(iter(loader(Toy(12, broken=range(12)), workers=workers)))


def test_samples_without_a_caption_are_passed_over_but_not_broken() -> None:
    used = loader(Toy(mute=range(0, 40, 2)), stop=100, required=frozenset({"text"}))
    assert all(i % 2 for b in used for i in b.ids.tolist())
    assert set(used.bad) == {"no text"}
    assert used.read > 1000


def test_no_captions_at_all_names_the_remedy() -> None:
    hints = {"text": "objectives.clip=null"}
    with pytest.raises(DataFault, match=r"no text: 40.*objectives.clip=null does without it"):
        next(iter(loader(Toy(mute=range(40)), required=frozenset({"text"}), hints=hints)))


def test_a_field_the_dataset_lacks_is_a_fault_before_anything_is_read() -> None:
    with pytest.raises(DataFault, match=r"no 'audio'.*image, label, name, text; objectives.clip=null"):
        loader(rows={"audio": 1}, hints={"audio": "objectives.clip=null"})
    with pytest.raises(DataFault, match=r"empty"):
        loader(Toy(0))
    with pytest.raises(ValueError, match=r"exceed data.batch_size"):
        loader(rows={"label": 9})


class Deadly(Toy):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_is_one_clear_fault() -> None:
    with pytest.raises(DataFault, match=r"(?s)worker died before step 1: .*SIGKILL.*0 reads without them"):
        next(iter(loader(Deadly(), workers=1)))
