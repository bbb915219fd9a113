"""``manifest.json`` beside latents: whose they are, how they were made, and what each shard is.

It is written last, so a folder with a manifest is complete. Two layouts differ in their statistics alone.
``vtp`` writes ``statistics.safetensors``: ``mean`` and ``std`` (C,), ``count``, ``of``. ``lightningdit`` writes
``latents_stats.pt``, a dict with ``mean`` and ``std`` (1, C, 1, 1), since LightningDiT takes every
``*.safetensors`` of a folder for a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vtp_core.errors import DataFault
from vtp_core.run.files import reason, replace, replace_json

NAME = "manifest.json"
FORMAT = "vtp latents 1"
SHARD = re.compile(r"latents-\d{5,}\.safetensors")
STATISTICS = {"vtp": "statistics.safetensors", "lightningdit": "latents_stats.pt"}
"""Layout -> its file of statistics."""
AGAIN = "write them with: vtp latents RUN -o DIR"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of latents."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder of latents holds.

    Attributes:
        layout: ``vtp`` or ``lightningdit``.
        protocol: how the latents were made; equal protocols make equal latents.
        shape: of one latent, (C, *grid).
        tensors: names in every shard.
        fields: raw field -> the tensor that holds it.
        provides: output that no module need compute -> its tensor, ``latent`` and those of teachers.
        names: names behind integer fields, ``label`` among them.
        samples: latents in all shards.
        skipped: samples of the data that could not be read.
        statistics: sha256 of their file.
        shards: in the order of the data.
        run: where the tokenizer came from.
    """

    layout: str
    protocol: dict[str, Any]
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    fields: dict[str, str]
    provides: dict[str, str]
    names: dict[str, list[str]]
    samples: int
    skipped: int
    statistics: str
    shards: tuple[Shard, ...]
    run: str

    @property
    def key(self) -> str:
        """Hash of the protocol."""
        return key_of(self.protocol)


def key_of(protocol: Mapping[str, Any]) -> str:
    """Hash of a protocol."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()


def write(folder: Path, manifest: Manifest) -> Path:
    """Put the manifest beside its shards.

    Raises:
        StorageFault: it could not be written.
    """
    path = folder / NAME
    replace_json(path, {"format": FORMAT, **asdict(manifest)})
    return path


def read(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        DataFault: there is none, or it cannot be understood.
    """
    try:
        table = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if table.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        shards = tuple(Shard(**entry) for entry in table.pop("shards"))
        table |= {"shape": tuple(table["shape"]), "tensors": tuple(table["tensors"]), "shards": shards}
        found = Manifest(**table)
        if any(not SHARD.fullmatch(shard.name) for shard in shards):
            raise ValueError("it names files that are no shards")
        if found.layout not in STATISTICS or found.samples != sum(s.samples for s in shards):
            raise ValueError("its layout or its counts are wrong")
    except (FileNotFoundError, NotADirectoryError) as error:
        unfinished = " (a write that has not finished; the same command goes on)" if _begun(folder) else ""
        raise DataFault(f"data: {folder} has no {NAME}{unfinished}; {AGAIN}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataFault(f"data: {folder / NAME} cannot be read ({error}); {AGAIN}") from error
    return found


def _begun(folder: Path) -> bool:
    return folder.is_dir() and any(SHARD.fullmatch(path.name) for path in folder.iterdir())


def write_statistics(folder: Path, layout: str, statistics: Mapping[str, Tensor]) -> str:
    """Put the statistics beside the shards, in the form of the layout; returns the file's sha256."""
    held = {name: value.detach().cpu().contiguous() for name, value in statistics.items()}
    if layout == "lightningdit":
        held |= {name: held[name].view(1, -1, 1, 1) for name in ("mean", "std")}
        stream = io.BytesIO()
        torch.save(held, stream)
        data = stream.getvalue()
    else:
        data = save(held)
    replace(folder / STATISTICS[layout], data)
    return hashlib.sha256(data).hexdigest()


def read_statistics(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """``mean`` and ``std`` (C,) and what else is known, in either layout.

    Raises:
        DataFault: the file is missing or not what the manifest says.
    """
    path = folder / STATISTICS[manifest.layout]
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.statistics:
            raise ValueError("its sha256 is not the manifest's")
        found = (
            torch.load(io.BytesIO(data), weights_only=True)
            if manifest.layout == "lightningdit"
            else load(data)
        )
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise DataFault(f"data: {path} cannot be used: {reason(error)}; {AGAIN}") from error
    return {name: value.flatten() if name in {"mean", "std"} else value for name, value in found.items()}
