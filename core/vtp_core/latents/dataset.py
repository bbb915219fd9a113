"""Dataset ``latents``: what ``vtp latents`` wrote, memory-mapped; no encoder runs for it."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtp_core.data.manifest import sha256
from vtp_core.data.order import permutation
from vtp_core.errors import DataFault
from vtp_core.latents import manifest
from vtp_core.latents.encoding import MIRRORED, normal
from vtp_core.latents.manifest import Shard
from vtp_core.run.files import reason
from vtp_core.statistics import unhexed
from vtp_plugins.spec import Spec


@dataclass(frozen=True, slots=True)
class _Opened:
    """A shard: tensors that are mapped, and integer fields as plain numbers, which are quicker to hand out."""

    tensors: dict[str, Tensor]
    numbers: dict[str, list[int | None]]


SMALL = 2**30  # bytes that are hashed within a second or two


class Latents:
    """Raw latents and what was stored beside them.

    A sample has ``latent`` (C, *grid) float32 and, where they were stored, ``label`` and other integers,
    ``text`` (an embedding (E,)), ``image`` (uint8, already prepared) and ``teacher:NAME/OUTPUT``.
    ``dataset[i]`` is the sample as it is; :meth:`draw` is what an epoch sees of it: mirrored or not, in all
    fields at once, and drawn from its posterior where moments were stored.

    Args:
        spec: shapes of the tokenizer that the latents must be of.
        split: ``train``, or ``val`` where it is given.
        path: folder that ``vtp latents`` wrote.
        val: such a folder of other samples.
        flip: half of the draws are mirrored, if the latents were written with their mirror images.
        verify: ``size`` compares the sizes of the shards at the start, ``full`` also their sha256; ``auto`` does
            so where they take a gigabyte at most.

    Attributes:
        tokenizer_digest: (32,) uint8, ``vtp_core.statistics.digest`` of the tokenizer that wrote them.
        embedding_width: E of the embeddings; 0 without.
        manifest: of the split.
    """

    provides: frozenset[str] = frozenset({"latent"})
    prepared: frozenset[str] = frozenset({"image"})

    def __init__(
        self,
        spec: Spec,
        split: str = "train",
        *,
        path: str,
        val: str = "",
        flip: bool = True,
        verify: Literal["auto", "size", "full"] = "auto",
    ) -> None:
        self.splits: tuple[str, ...] = ("train", "val") if val else ("train",)
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise ValueError(
                f"data: the latents have no split {split!r}; they have {known}, data.val adds one"
            )
        self.folder = Path(val if split == "val" else path).expanduser()
        self.split, self.manifest = split, manifest.read(self.folder)
        self.tokenizer_digest = self._digest()
        self._check_spec(spec)
        small = sum(shard.bytes for shard in self.manifest.shards) <= SMALL
        for shard in self.manifest.shards:
            self._check_shard(shard, verify == "full" or (verify == "auto" and small))
        self._statistics = manifest.read_statistics(self.folder, self.manifest)
        self._ends = list(accumulate(shard.samples for shard in self.manifest.shards))
        self._open: dict[int, _Opened] = {}
        self.flip = flip and f"latents{MIRRORED}" in self.manifest.tensors
        self.provides = frozenset(self.manifest.provides)
        self.fields = self.provides | {"name", *self.manifest.fields}
        self.names: Mapping[str, Sequence[str]] = self.manifest.names
        texts = self._opened(0).tensors.get("embeddings")
        self.embedding_width: int = 0 if texts is None else texts.shape[1]

    def _digest(self) -> Tensor:
        try:
            return unhexed(self.manifest.protocol["tokenizer"])
        except (LookupError, TypeError, ValueError) as error:
            raise DataFault(
                f"data: {self.folder / manifest.NAME} names no tokenizer; {manifest.AGAIN}"
            ) from error

    def _check_spec(self, spec: Spec) -> None:
        wanted = (spec.channels, *spec.grid)
        if spec.channels and self.manifest.shape != wanted:
            raise DataFault(
                f"data.path: {self.folder} holds latents of {_shape(self.manifest.shape)}, the stack's "
                f"tokenizer makes {_shape(wanted)}; {manifest.AGAIN}, RUN being that of tokenizer.from"
            )

    def _check_shard(self, shard: Shard, full: bool) -> None:
        path = self.folder / shard.name
        if not path.is_file():
            raise self._broken(shard, "is missing")
        if (size := path.stat().st_size) != shard.bytes:
            raise self._broken(shard, f"has {size} bytes, its manifest says {shard.bytes}")
        if full and sha256(path) != shard.sha256:
            raise self._broken(shard, "has another sha256 than its manifest says")

    def _broken(self, shard: Shard, what: str) -> DataFault:
        again = f"vtp latents {self.manifest.run} -o {self.folder}"
        return DataFault(
            f"data: {self.folder / shard.name} {what}; remove it, and the command that wrote the folder writes it "
            f"again and keeps the others: {again}, with the options it had"
        )

    def statistics(self) -> dict[str, Tensor]:
        """``mean`` and ``std`` (C,) that standardise the latents, ``count`` and ``of``."""
        return dict(self._statistics)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def shards(self) -> list[tuple[str, int]]:
        """Name and samples of each shard, as the manifest has them."""
        return [(shard.name, shard.samples) for shard in self.manifest.shards]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sample(index, mirrored=False)

    def draw(self, index: int, key: int) -> dict[str, Any]:
        """The sample as one epoch sees it.

        Args:
            index: of the sample.
            key: stands for seed, epoch and sample; an equal key gives an equal draw.
        """
        return self._sample(index, self.flip and key % 2 == 1, key)

    def _sample(self, index: int, mirrored: bool, key: int | None = None) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{len(self)} latents, no sample {index}")
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        opened, end = self._opened(number), MIRRORED if mirrored else ""
        held = opened.tensors
        sample: dict[str, Any] = {
            name: held[f"{tensor}{end}"][row] for name, tensor in self.manifest.provides.items()
        }
        if "deviations" in held and key is not None:
            deviation = held[f"deviations{end}"][row]
            sample["latent"] = sample["latent"] + deviation * normal(deviation.shape, key)
        for name, tensor in self.manifest.fields.items():
            if tensor in opened.numbers:
                sample[name] = opened.numbers[tensor][row]
            else:
                value = held[tensor][row]
                sample[name] = value.flip(-1) if mirrored and name in self.prepared else value
        sample["name"] = f"{self.manifest.shards[number].name}, sample {row}"
        return sample

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """A fresh permutation each epoch: reading anywhere costs the same."""
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Hash over the shards' hashes."""
        lines = [self.manifest.key, *(shard.sha256 for shard in self.manifest.shards)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _opened(self, number: int) -> _Opened:
        """The tensors of a shard; pages are read when touched, and shared by forked workers."""
        if number not in self._open:
            self._open[number] = self._mapped(self.manifest.shards[number])
        return self._open[number]

    def _mapped(self, shard: Shard) -> _Opened:
        try:
            with safe_open(self.folder / shard.name, "pt") as file:
                held = {name: file.get_tensor(name) for name in self.manifest.tensors}
        except (OSError, SafetensorError) as error:
            raise self._broken(shard, f"cannot be read ({reason(error)})") from error
        if any(len(tensor) != shard.samples for tensor in held.values()):
            raise self._broken(shard, f"does not hold {shard.samples} samples")
        if tuple(held["latents"].shape[1:]) != self.manifest.shape:
            raise self._broken(shard, f"holds no latents of {_shape(self.manifest.shape)}")
        numbers = {
            name: [value if value >= 0 else None for value in held[name].tolist()]
            for name in self.manifest.fields.values()
            if held[name].ndim == 1
        }
        return _Opened(held, numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # mapped anew in another process


def _shape(shape: Sequence[int]) -> str:
    """(16, 8, 8) as people say it."""
    return f"{shape[0]} channels on {' x '.join(map(str, shape[1:]))}"
