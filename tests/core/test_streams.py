"""Every dataset gives the same samples, byte by byte, to any number of processes and workers."""

from __future__ import annotations

import functools
import itertools
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import write_stack

from vtp_core import load_stack, train
from vtp_core.data import order
from vtp_core.data.folder import ImageFolder
from vtp_core.data.loader import Loader
from vtp_core.data.manifest import write_manifest
from vtp_core.data.shards import Shards
from vtp_core.data.views import Crops, Plain
from vtp_core.latents.dataset import Latents
from vtp_core.latents.writer import write_latents
from vtp_emoji import Emoji
from vtp_plugins.spec import Spec

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
SPEC = Spec(size=(32, 32), patch=(8, 8), channels=8)
VIEWS = {"plain": Plain(size=16, flip=0.5), "two": Crops(size=16, blur_taps=3)}
ROWS = {"plain": 8, "two": 4, "label": 8}
PICTURES, BATCH, STEPS = 22, 8, 6  # more than two epochs
KINDS = ("image_folder", "webdataset", "emoji", "latents")
FAST = [(1, 4), (2, 1), (4, 0)]
Rows = dict[tuple[int, int], tuple[int, dict[str, bytes]]]
"""(step, global row) -> the sample and its bytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as files, in two shards, and as latents."""
    top = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(256, size=(PICTURES, 6, 6, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        place = top / "pictures" / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((40, 36)).save(place / f"{number:02d}.png")
    (top / "shards").mkdir()
    files = sorted((top / "pictures").rglob("*.png"))
    for shard, members in enumerate((files[:15], files[15:])):
        with tarfile.open(top / "shards" / f"{shard}.tar", "w") as tar:
            for file in members:
                file.with_suffix(".cls").write_text(str(int(file.stem) % 2))
                tar.add(file, file.name)
                tar.add(file.with_suffix(".cls"), file.with_suffix(".cls").name)
    write_manifest(top / "shards")
    return top


@pytest.fixture(scope="module")
def latents(folder: Path) -> Path:
    overrides = [
        "data.use=image_folder", f"data.root={folder / 'pictures'}", "data.holdout=0.0", "data.workers=0",
        *(f"~objectives.{name}" for name in ("clip", "dino", "ibot", "koleo")), "train.steps=1",
        f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    write_latents(train(load_stack(write_stack(folder), overrides)).path, folder / "latents", shard_size=9)
    return folder / "latents"


def opened(kind: str, folder: Path) -> Any:
    made: Mapping[str, Callable[[], Any]] = {
        "image_folder": lambda: ImageFolder(SPEC, root=str(folder / "pictures"), holdout=0),
        "webdataset": lambda: Shards(SPEC, path=str(folder / "shards")),
        "emoji": lambda: Emoji(SPEC),
        "latents": lambda: Latents(SPEC, path=str(folder / "latents")),
    }
    return made[kind]()


def read(dataset: Any, world: int = 1, workers: int = 0, steps: int = STEPS) -> Rows:
    """Every row that the processes read, by its place in the global batch."""
    views = {} if "latent" in dataset.fields else VIEWS
    rows = ROWS if views else {"latent": 8, "label": 8}
    found: Rows = {}
    for rank in range(world):
        own = {name: count // world for name, count in rows.items()}
        loader = Loader(
            dataset, views, own, batch_size=BATCH, seed=3, rank=rank, world=world, workers=workers, stop=steps
        )
        for batch in loader:
            for row, sample in enumerate(batch.ids.tolist()):
                values = {
                    name: value[row].numpy().tobytes()
                    for name, value in batch.values.items()
                    if row < own[name]
                }
                found[batch.step, rank + world * row] = sample, values
    return found


def by_epoch(rows: Rows, count: int) -> list[Counter[int]]:
    """How often each epoch saw each sample; a step's rows stand at permuted positions of the stream."""
    stream = {
        order.batch(BATCH, step, seed=3)[row]: sample for (step, row), (sample, _) in sorted(rows.items())
    }
    return [
        Counter(stream[position] for position in range(first, min(first + count, len(stream))))
        for first in range(0, len(stream), count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_views_are_the_same_for_any_workers_and_processes(
    kind: str, folder: Path, latents: Path
) -> None:
    dataset = opened(kind, folder)
    whole = read(dataset)
    assert len(whole) == STEPS * BATCH
    for world, workers in FAST:
        assert read(opened(kind, folder), world, workers) == whole, (world, workers)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), sorted({*itertools.product((1, 2, 4), (0, 1, 4))} - {*FAST}))
@pytest.mark.parametrize("kind", KINDS)
def test_so_they_are_for_every_pair(kind: str, world: int, workers: int, folder: Path, latents: Path) -> None:
    assert read(opened(kind, folder), world, workers) == read(opened(kind, folder))


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_comes_once_an_epoch(kind: str, folder: Path, latents: Path) -> None:
    dataset = opened(kind, folder)
    for epoch in by_epoch(read(dataset, world=2), len(dataset)):
        assert set(epoch.values()) == {1}
        assert kind == "emoji" or len(epoch) in (PICTURES, STEPS * BATCH % PICTURES)


def test_fewer_shards_than_processes_and_workers_are_shared_out_by_sample(folder: Path) -> None:
    dataset = opened("webdataset", folder)
    found = read(dataset, world=4, workers=4)  # two shards, sixteen readers
    assert {sample for sample, _ in found.values()} == set(range(PICTURES))


@pytest.mark.parametrize("world", [1, 4])
def test_fewer_samples_than_a_batch_begin_the_next_epoch_within_it(tmp_path: Path, world: int) -> None:
    for number in range(5):
        Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    dataset = ImageFolder(SPEC, root=str(tmp_path), holdout=0)
    views: dict[str, Any] = {"plain": Plain(size=16, flip=0.5)}
    found: Rows = {}
    for rank in range(world):
        rows = {"plain": BATCH // world}
        for batch in Loader(dataset, views, rows, batch_size=BATCH, seed=3, rank=rank, world=world, stop=5):
            assert len(batch.values["plain"]) == BATCH // world
            found |= {(batch.step, rank + world * r): (s, {}) for r, s in enumerate(batch.ids.tolist())}
    assert by_epoch(found, 5) == [Counter(range(5))] * 8
    for step in range(5):
        assert max(Counter(found[step, row][0] for row in range(BATCH)).values()) <= 3  # of 8 rows from 5


# ---- sub-batches


@pytest.mark.parametrize(("world", "micros"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_a_sub_batch_holds_the_same_samples_for_any_processes_and_micro_batches(
    world: int, micros: int
) -> None:
    size, rows = 32, 8
    for step in range(50):
        stream = order.batch(size, step, seed=1)
        met = [
            position
            for rank in range(world)
            for micro in range(micros)
            for position in list(order.local(stream, rank, world, size // world))[micro::micros][
                : rows // (world * micros)
            ]
        ]
        assert sorted(met) == sorted(stream[:rows])


@functools.cache
def epoch_of(epoch: int, count: int) -> list[int]:
    return list(order.permutation(count, 0, epoch))


def test_sub_batches_take_every_sample_equally_often() -> None:
    count, size, rows, steps = 64, 16, 4, 10_000
    seen = np.zeros(count, dtype=np.int64)
    for step in range(steps):
        for position in order.batch(size, step, seed=0)[:rows]:
            epoch, place = divmod(position, count)
            seen[epoch_of(epoch, count)[place]] += 1
    share, epochs = rows / size, steps * size / count
    sigma = (epochs * share * (1 - share)) ** 0.5
    assert seen.sum() == steps * rows
    assert np.abs(seen - epochs * share).max() < 4 * sigma
