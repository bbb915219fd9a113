"""Our own layout of an export: safetensors, ``stack.yaml``, ``config.json`` and a model card.

``config.json`` names every file of tensors with its checkpoint part, size and sha256; it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vtp_core.errors import DataFault, StorageFault
from vtp_core.run import manifest
from vtp_core.run.files import reason
from vtp_core.run.tensors import read_tensors

MODEL_TYPE = "vtp-plugins"
FORMAT = 1
CONFIG = "config.json"
_MAX_BYTES = 1 << 20

Parts = dict[str, dict[str, Tensor]]


def is_native(path: Path) -> bool:
    """Whether a directory is an export of ours, not a run."""
    return (path / "stack.yaml").is_file() and (path / CONFIG).is_file() and not (path / "run.json").exists()


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of an export, checked.

    Raises:
        DataFault: it is missing, broken or of a newer format.
    """
    file = path / CONFIG
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        found = json.loads(raw)
        if len(raw) > _MAX_BYTES or not isinstance(found, dict) or found.get("model_type") != MODEL_TYPE:
            raise ValueError(f"its model_type is not {MODEL_TYPE!r}")
        if not isinstance(found.get("format"), int) or found["format"] > FORMAT:
            raise ValueError("it is of a newer vtp-plugins; upgrade: pip install -U vtp-plugins")
        if not _sound(found.get("files")):
            raise ValueError("its list of files is broken")
    except (OSError, ValueError, RecursionError) as error:
        raise DataFault(f"{file} cannot be read: {error}") from error
    return found


def _sound(files: Any) -> bool:
    """Whether all files are plain names of safetensors, described in full, each with a part of its own."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return False
    plain = all(name == Path(name).name and name.endswith(".safetensors") for name in files)
    kinds = {"part": str, "bytes": int, "sha256": str}
    typed = all(isinstance(e.get(key), kind) for e in files.values() for key, kind in kinds.items())
    return plain and typed and len({e["part"] for e in files.values()}) == len(files)


def read_native(path: Path) -> Parts:
    """Tensors of an export by checkpoint part; sizes and sha256 are compared.

    Raises:
        DataFault: a file is missing or broken.
    """
    parts: Parts = {}
    for name, entry in read_config(path)["files"].items():
        try:
            manifest.check(path / name, entry, True)
            parts[entry["part"]] = read_tensors(path / name)
        except (OSError, SafetensorError, StorageFault, ValueError) as error:
            raise DataFault(f"{path}: {name} is broken ({_first(error)}); export it again") from error
    if "tokenizer" not in parts:
        raise DataFault(f"{path / CONFIG} names no tokenizer; export it again")
    return parts


def _first(error: Exception) -> str:
    return reason(error).splitlines()[0]


def config_text(
    name: str, weights: str, step: int, data: str, files: Mapping[str, Any], official: Mapping[str, Any]
) -> str:
    """The text of ``config.json``.

    Args:
        name: of the run's stack.
        weights: ``student`` or ``ema``.
        step: of the checkpoint.
        data: fingerprint of the data.
        files: entries as :func:`vtp_core.run.manifest.seal` makes them, with their ``part``.
        official: fields of the VTP release's config that the stack does not hold; empty where it came from a run.
    """
    tree = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "name": name,
        "weights": weights,
        "step": step,
        "data": data,
        "files": dict(sorted(files.items())),
    }
    return json.dumps(tree | ({"official": dict(official)} if official else {}), indent=2) + "\n"
