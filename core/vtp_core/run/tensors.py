"""Safetensors into memory of our own: no mapping of the file stays, and sums do not depend on where it lay."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype, such as ``F32``, of every tensor; of the data nothing is read.

    Raises:
        OSError, SafetensorError: the file is missing or broken.
    """
    with safe_open(path, "pt") as file:
        held = {name: file.get_slice(name) for name in list(file.keys())}
        return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in held.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each in memory that torch has allocated; the peak is the file's size.

    ``safetensors.torch.load_file`` maps the file, where tensors lie at odd addresses: matrix products round
    differently there, and what is copied out of a mapping counts twice while it lasts.

    Raises:
        OSError, SafetensorError, ValueError: the file is missing, broken, or has a dtype that torch has not.
    """
    shapes = read_header(path)  # safetensors checks the file
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        return {name: _read(file, 8 + length, header[name], *shapes[name]) for name in shapes}


def _read(file: Any, start: int, entry: Any, shape: tuple[int, ...], dtype: str) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not read")
    kind = DTYPES[dtype]
    raw = torch.empty(math.prod(shape) * kind.itemsize, dtype=torch.uint8)
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    if end - begin != len(raw) or (len(raw) and file.readinto(raw.numpy()) != len(raw)):
        raise ValueError("the file ends early")
    return raw.view(kind).reshape(shape)
