"""Webdataset tar shards read in an order of ours, checked against the manifest beside them."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vtp_core.data.manifest import Shard, expanded, read_manifest, sha256
from vtp_core.data.order import Windows
from vtp_core.data.pictures import MAX_PIXELS, BadSample, decode, of_disk
from vtp_core.data.tar import IMAGES, Index, read_index, read_member, text_fields
from vtp_plugins.errors import DataFault
from vtp_plugins.spec import Spec


class Shards:
    """Samples of tar shards by index.

    A shard whose size (or hash) is not the manifest's, or whose headers cannot be read, is never half used:
    each of its samples counts as broken, and the loader's bound on broken samples applies.

    Args:
        spec: shapes of the tokenizer.
        split: ``train`` or ``val``.
        path: a folder of shards, one shard, or a pattern like ``data/{0000..0099}.tar``; local files only.
        val: the same for the split ``val``.
        holdout: without ``val``, share of every shard's samples, its last ones, kept as ``val``.
        verify: ``size`` compares sizes, ``full`` also sha256, at a shard's first use in each process.
        window: shards that are mixed with each other.
        open_shards: shards kept open in each process.
        short_side: pictures are shrunk by a whole factor that leaves the short side this long at least;
            None is twice the stack's size, which the smallest crops need, and 0 keeps them as they are.
        max_pixels: a larger picture counts as broken, before it is decoded.
    """

    provides: frozenset[str] = frozenset()

    def __init__(
        self,
        spec: Spec,
        split: str = "train",
        *,
        path: str,
        val: str = "",
        holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        verify: Literal["size", "full"] = "size",
        window: Annotated[int, Field(ge=1)] = 8,
        open_shards: Annotated[int, Field(ge=1)] = 16,
        short_side: Annotated[int, Field(ge=0)] | None = None,
        max_pixels: Annotated[int, Field(gt=0)] = MAX_PIXELS,
    ) -> None:
        self.splits: tuple[str, ...] = ("train", "val") if val or holdout else ("train",)
        if split not in self.splits:
            raise ValueError(f"data: the shards have no split {split!r}; they have {', '.join(self.splits)}")
        self.split, self.verify, self.window = split, verify, window
        self.short_side = 2 * max(spec.size) if short_side is None else short_side
        self.max_pixels, self.open_shards = max_pixels, open_shards
        place = val if split == "val" and val else path
        self._shards, self.names = described(expanded(place), Path(place).expanduser().is_dir())
        share = 0.0 if val else holdout
        self._ranges = [part(shard.samples, share, split) for _, shard in self._shards]
        self._ends = list(accumulate(len(rows) for rows in self._ranges))
        self.fields = frozenset({"name"}.union(*(shard.fields for _, shard in self._shards)))
        self._open: OrderedDict[int, tuple[int, Index]] = OrderedDict()
        self._refused: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Name and samples of each shard, as the manifest has them."""
        return [(s.name, len(rows)) for (_, s), rows in zip(self._shards, self._ranges, strict=True)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{len(self)} samples, no sample {index}")
        number = bisect_right(self._ends, index)
        row = self._ranges[number][index - (self._ends[number - 1] if number else 0)]
        descriptor, table = self._opened(number)
        sample = table[row]
        name = f"{self._shards[number][0].name}, sample {row}"
        extension = next((e for e in sample if e.rpartition(".")[2] in IMAGES), None)
        if extension is None:
            raise BadSample("no picture", name)
        data = read_member(descriptor, sample[extension], name)
        image = decode(data, name, self.short_side, self.max_pixels)
        return {"image": image, "name": name, **text_fields(descriptor, sample, name)}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """Shards shuffled, then samples inside windows of shards."""
        return Windows([len(rows) for rows in self._ranges], seed, epoch, self.window)

    def fingerprint(self) -> str:
        """Hash over the shards' hashes and the split."""
        lines = [f"{shard.name} {shard.sha256}" for _, shard in self._shards]
        return hashlib.sha256("\n".join([self.split, *lines]).encode()).hexdigest()

    def _opened(self, number: int) -> tuple[int, Index]:
        """The open file and index of a shard; the shards used longest ago are closed."""
        if number in self._refused:
            raise self._refused[number]
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path, shard = self._shards[number]
        try:
            index = checked(path, shard, self.verify)
        except BadSample as refusal:
            if not of_disk(refusal):
                self._refused[number] = refusal
            raise
        self._open[number] = (os.open(path, os.O_RDONLY | os.O_CLOEXEC), index)
        while len(self._open) > self.open_shards:
            os.close(self._open.popitem(last=False)[1][0])
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors mean nothing in another process

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_open", {}).values():
            os.close(descriptor)


def described(
    paths: Sequence[Path], whole: bool
) -> tuple[list[tuple[Path, Shard]], Mapping[str, Sequence[str]]]:
    """Shards with their manifest entries, and the names behind labels.

    Args:
        paths: the shards.
        whole: they are all that their folder has, so that one which only the manifest knows is missed.
    """
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path in paths}}
    found: list[tuple[Path, Shard]] = []
    for path in paths:
        shard = manifests[path.parent][0].get(path.name)
        if shard is None:
            raise DataFault(
                f"data: {path} is not in the manifest; write it with `vtp data manifest {path.parent}`"
            )
        found.append((path, shard))
    for folder, (listed, _) in manifests.items():
        if whole and (gone := sorted(set(listed) - {path.name for path in paths})):
            raise DataFault(
                f"data: {folder} has no {gone[0]}, which its manifest lists; bring it back, or write the "
                f"manifest again: vtp data manifest {folder}"
            )
    return found, manifests[paths[0].parent][1]


def part(samples: int, share: float, split: str) -> range:
    """Rows of a shard that belong to a split; the last ones are held out."""
    kept = samples - round(samples * share)
    return range(kept, samples) if split == "val" and share else range(kept)


def checked(path: Path, shard: Shard, verify: str) -> Index:
    """The index of a shard that is what its manifest says.

    Raises:
        BadSample: it is not.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadSample("missing shard", path.name, str(error)) from error
    if size != shard.bytes:
        raise BadSample("truncated shard", path.name, f"{size} bytes, the manifest says {shard.bytes}")
    if verify == "full" and sha256(path) != shard.sha256:
        raise BadSample("changed shard", path.name, "its sha256 is not the manifest's")
    index = read_index(path)
    if len(index) != shard.samples:
        raise BadSample(
            "changed shard", path.name, f"{len(index)} samples, the manifest says {shard.samples}"
        )
    return index
