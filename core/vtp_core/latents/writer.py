"""``vtp latents``: a run's data through its tokenizer, once, into shards that other stacks train from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from vtp_core.data.loader import COUNTED_FROM
from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.latents import manifest, setting, shards
from vtp_core.latents.encoding import Encoding
from vtp_core.latents.manifest import Manifest, Shard
from vtp_core.latents.reading import Reading, Rows, read
from vtp_core.run.files import PARTIAL, reason
from vtp_core.run.lock import Lock
from vtp_plugins.registry import Registry

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset

ROWS = 64  # signals of one pass
SHARD_BYTES = 512 * 2**20  # of one shard at most: it is held in memory before it is written
EVERY = 10.0  # seconds between notes
Note = Callable[[str], object]


def write_latents(
    run: Path,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    flip: bool = True,
    posterior: Literal["mean", "sample", "moments"] = "mean",
    layout: Literal["vtp", "lightningdit"] = "vtp",
    images: bool = False,
    teacher: str | None = None,
    shard_size: int = 10_000,
    split: str | None = None,
    weights: Literal["student", "ema"] = "student",
    device: str | None = None,
    registry: Registry | None = None,
    note: Note = lambda line: None,
) -> Path:
    """Write the raw latents of a run's data, the statistics that standardise them, and a manifest.

    ``latents-00000.safetensors`` holds ``latents`` (n, C, h, w), ``latents_flip`` of the mirrored images and
    ``labels`` (n,) int64, -1 for none; ``fields/NAME`` are further integer fields, and
    :class:`~vtp_core.latents.encoding.Encoding` says what else is stored. Samples keep the order of their
    dataset. Each shard appears whole, and the manifest last: the same call after an interruption keeps the
    finished shards, and a finished folder is left as it is.

    Args:
        run: a run directory; its stack names the data.
        out: folder to write; made if absent.
        overrides: of the stack's ``data`` and ``teachers``, such as ``data.use=image_folder``.
        flip: store the latents of the mirrored images.
        posterior: ``mean``, ``sample`` or ``moments``, where the bottleneck draws from a posterior.
        layout: ``lightningdit`` writes what LightningDiT's own dataset reads, statistics included: it
            needs ``flip``, and nothing but latents and labels is stored for it.
        images: store the images, centre-prepared to the tokenizer's size.
        teacher: store an output of this entry of the stack's ``teachers``: ``NAME``, which means its patches,
            or ``NAME/OUTPUT``.
        shard_size: samples of a shard; fewer where they would take more than 512 MiB.
        split: of the data; by default the one that is trained on.
        weights: ``student``, or ``ema`` where the run kept an EMA teacher.
        device: where to encode; by default a GPU where there is one.
        registry: what is installed.
        note: told how it goes, in lines.

    Returns:
        The manifest.

    Raises:
        StackFault: an option that does not fit the run, or ``out`` holds other latents.
        DataFault: the run or its data are missing or broken.
        StorageFault: a shard could not be written.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = setting.prepared(run, overrides, split, weights, device, registry or Registry())
    encoding = Encoding(
        found.tokenizer, posterior, flip, images, found.teacher(teacher), found.texts and layout == "vtp"
    )
    setting.check_layout(layout, encoding, shard_size)
    _folder(out)
    try:
        lock = Lock(out / ".lock")
    except StackFault as busy:
        raise StackFault(f"{out}: another process writes there; wait for it, or give another -o") from busy
    try:
        return _Writer(found, encoding, layout, out, shard_size, note).run(run)
    finally:
        lock.release()


@dataclass(slots=True)
class _Tally:
    """Samples read, and names of those left out."""

    read: int = 0
    skipped: list[str] = field(default_factory=list)


class _Writer:
    def __init__(
        self, found: setting.Setting, encoding: Encoding, layout: str, out: Path, shard_size: int, note: Note
    ) -> None:
        self.found, self.encoding, self.layout, self.out, self.note = found, encoding, layout, out, note
        self.dataset: Dataset = found.dataset
        blank = torch.zeros(1, found.spec.signal_channels, *found.spec.size, dtype=torch.uint8)
        probe = encoding(blank, [0], [""])  # before any data is read: what one sample takes
        self.probe, self.shape = probe.keys(), tuple(probe["latents"].shape[1:])
        self.rows = max(1, min(shard_size, SHARD_BYTES // sum(value.nbytes for value in probe.values())))
        self.labels_only = layout == "lightningdit"
        self.numbers = ["label"] if self.labels_only else sorted({"label", *found.numbers})
        self.protocol = {
            **encoding.protocol(), "layout": layout, "split": found.split, "data": found.data_hash,
            "shard_size": self.rows,
        }  # fmt: skip
        self.key = manifest.key_of(self.protocol)
        self.tally, self.pending = _Tally(), 0
        self.began = self.noted = time.monotonic()

    def run(self, run: Path) -> Path:
        earlier = self._earlier()
        if earlier is not None and all(shards.same(self.out, shard) for shard in earlier.shards):
            self.note(f"{self.out} is finished: {earlier.samples} latents")
            return self.out / manifest.NAME
        written = list(self._shards(earlier))
        if not written:
            raise DataFault(f"data: none of {self.tally.read} samples can be read{self._examples()}")
        samples = sum(shard.samples for shard in written)
        skipped = len(self.dataset) - samples
        if skipped:
            self.note(f"data: left out {skipped} of {len(self.dataset)} samples{self._examples()}")
        return manifest.write(
            self.out,
            Manifest(
                layout=self.layout, protocol=self.protocol, shape=self.shape, samples=samples, skipped=skipped,
                statistics=manifest.write_statistics(self.out, self.layout, self.found.statistics()),
                shards=tuple(written), run=str(run), **self._contents(),
            ),
        )  # fmt: skip

    def _contents(self) -> dict[str, Any]:
        """Tensors of the shards, what they are to a dataset, and names behind integers."""
        fields = {name: shards.number_tensor(name) for name in self.numbers if name in self.found.numbers}
        fields |= {"image": "images"} if self.encoding.images else {}
        fields |= {"text": "embeddings"} if self.encoding.texts else {}
        provides = {"latent": "latents"}
        if (teacher := self.encoding.teacher) is not None:
            provides[f"teacher:{teacher.name}/{teacher.output}"] = teacher.tensor
        tensors = {*self.probe, *(shards.number_tensor(name) for name in self.numbers)}
        names = {name: [str(value) for value in self.dataset.names.get(name, ())] for name in fields}
        return {
            "tensors": tuple(sorted(tensors)), "fields": fields, "provides": provides,
            "names": {name: values for name, values in names.items() if values},
        }  # fmt: skip

    # ---- what is there already

    def _earlier(self) -> Manifest | None:
        """The manifest of the same latents, if they were finished once.

        Raises:
            StackFault: the folder holds other latents.
        """
        if self.layout == "lightningdit":
            foreign = [p.name for p in self.out.glob("*.safetensors") if not manifest.SHARD.fullmatch(p.name)]
            if foreign:
                raise StackFault(
                    f"{self.out} holds {foreign[0]}, which LightningDiT would read; give another -o"
                )
        for path in self.out.glob(f"{PARTIAL}*"):
            path.unlink()
        if not (self.out / manifest.NAME).exists():
            return None
        earlier = manifest.read(self.out)
        if earlier.key != self.key:
            other = [name for name, value in self.protocol.items() if earlier.protocol.get(name) != value]
            raise StackFault(
                f"{self.out} holds latents of another {', '.join(other) or 'format'}; give another -o, or "
                "remove it first"
            )
        return earlier

    # ---- shards

    def _shards(self, earlier: Manifest | None) -> Iterator[Shard]:
        """Every shard in order: kept, or written now; one whose samples are all broken is left out."""
        total = len(self.dataset)
        parts = [range(start, min(start + self.rows, total)) for start in range(0, total, self.rows)]
        paths = [self.out / f"latents-{number:05d}.safetensors" for number in range(len(parts))]
        known = {shard.name: shard for shard in earlier.shards} if earlier else {}
        missing = [not shards.kept(path, self.key, known.get(path.name)) for path in paths]
        if kept := missing.count(False):
            self.note(f"{self.out}: {kept} of {len(paths)} shards are there already")
        batches = [batches_of(part) if new else [] for part, new in zip(parts, missing, strict=True)]
        self.pending = sum(len(part) for part, new in zip(parts, missing, strict=True) if new)
        labelled = self.labels_only and "label" in self.found.numbers
        reading = Reading(self.dataset, self.found.view, self.numbers, labelled)
        rows = read(reading, [batch for shard in batches for batch in shard], self.found.workers)
        try:
            for path, shard in zip(paths, batches, strict=True):
                if shard:
                    self._write(path, [self._encoded(next(rows)) for _ in shard])
                if path.exists():
                    yield shards.entry(path)
        finally:
            rows.close()

    def _encoded(self, rows: Rows) -> dict[str, Tensor]:
        """The tensors of one batch; empty where nothing could be read."""
        self._count(rows)
        if not rows.signals:
            return {}
        found = self.encoding(torch.stack(rows.signals), rows.indices, rows.texts)
        missing = 0 if self.labels_only else -1
        for name, column in rows.numbers.items():
            found[shards.number_tensor(name)] = torch.tensor(
                [missing if value is None else value for value in column]
            )
        return found

    def _count(self, rows: Rows) -> None:
        tally = self.tally
        tally.read += len(rows.indices) + len(rows.skipped)
        tally.skipped += rows.skipped
        if tally.read >= COUNTED_FROM and len(tally.skipped) > self.found.max_bad_fraction * tally.read:
            raise DataFault(
                f"data: {len(tally.skipped)} of {tally.read} samples read are broken, more than "
                f"data.max_bad_fraction={self.found.max_bad_fraction:g}{self._examples()}"
            )
        now = time.monotonic()
        if now - self.noted >= EVERY:
            self.noted = now
            rate = tally.read / (now - self.began)
            self.note(f"{tally.read} of {self.pending} samples encoded, {rate:.0f} a second")

    def _examples(self) -> str:
        return f": {'; '.join(self.tally.skipped[:3])}" if self.tally.skipped else ""

    def _write(self, path: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Put a shard into place, whole."""
        batches = [batch for batch in batches if batch]
        if not batches:
            path.unlink(missing_ok=True)
            return
        tensors = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        try:
            shards.publish(path, tensors, self.key)
        except (OSError, SafetensorError) as error:
            raise StorageFault(
                f"{path} could not be written: {reason(error)}; the same command goes on from there"
            ) from error
        self.note(f"{path}: {len(tensors['labels'])} latents")


def batches_of(part: range) -> list[range]:
    """A shard's samples in passes."""
    return [part[start : start + ROWS] for start in range(0, len(part), ROWS)]


def _folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFault(f"{out} cannot be made: {reason(error)}; -o names another place") from error
