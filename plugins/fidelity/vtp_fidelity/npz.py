"""The npz of ADM's evaluator: ``arr_0`` (n, H, W, 3) uint8, ``arr_1`` labels, ``mu`` and ``sigma``; streamed."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vtp_core.errors import DataFault, StorageFault
from vtp_core.run.files import PARTIAL, reason
from vtp_fidelity.frechet import Gaussian
from vtp_fidelity.pixels import Rounding, to_bytes

_BROKEN = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class Npz:
    """Samples or a reference in ADM's layout; images are read batch by batch, pickles never.

    Attributes:
        path: of the file.
        size: (H, W) of its images; None where it holds statistics alone.
        labels: (n,) int64, or None.
        identity: short hash of its contents' checksums.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._count = path, 0
        self.size: tuple[int, int] | None = None
        self.labels: Tensor | None = None
        try:
            with zipfile.ZipFile(path) as file:
                members = {entry.filename: entry for entry in file.infolist()}
                if "arr_0.npy" in members:
                    with file.open("arr_0.npy") as stream:
                        self._count, *sides = _header(stream)
                    self.size = (sides[0], sides[1])
            if "arr_1.npy" in members:
                self.labels = torch.from_numpy(self._array("arr_1").astype(np.int64).reshape(-1))
        except _BROKEN as error:
            raise DataFault(f"{path} is not an npz in ADM's layout: {reason(error)}") from error
        self._statistics = {"mu.npy", "sigma.npy"} <= set(members)
        if not self._count and not self._statistics:
            raise DataFault(
                f"{path} holds neither arr_0 (images) nor mu and sigma; it has {', '.join(members)}"
            )
        lines = "\n".join(f"{name} {entry.CRC} {entry.file_size}" for name, entry in members.items())
        self.identity = hashlib.sha256(lines.encode()).hexdigest()[:12]

    def __len__(self) -> int:
        return self._count

    @property
    def gaussian(self) -> Gaussian | None:
        """``mu`` and ``sigma`` where the file has them: of Inception's pool, as ADM's references are."""
        if not self._statistics:
            return None
        try:
            return Gaussian(self._array("mu").astype(np.float64), self._array("sigma").astype(np.float64))
        except _BROKEN as error:
            raise DataFault(f"{self.path}: mu or sigma cannot be read: {reason(error)}") from error

    def batches(self, rows: int) -> Iterator[Tensor]:
        """Images (rows, 3, H, W) uint8, in the file's order."""
        try:
            with zipfile.ZipFile(self.path) as file, file.open("arr_0.npy") as stream:
                shape = _header(stream)
                for start in range(0, shape[0], rows):
                    part = (min(rows, shape[0] - start), *shape[1:])
                    data = stream.read(int(np.prod(part)))
                    images = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(part).copy())
                    yield images.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
                stream.read(1)  # the end of a member is where zipfile compares its checksum
        except _BROKEN as error:
            raise DataFault(f"{self.path}: arr_0 is broken: {reason(error)}") from error

    def _array(self, name: str) -> Any:
        with np.load(self.path, allow_pickle=False) as file:
            return file[name]


def save_npz(
    path: str | Path, images: Tensor, labels: Tensor | None = None, rounding: Rounding = "round"
) -> Path:
    """Write samples in ADM's layout, for this and other evaluators.

    Args:
        path: of the file; an old one is replaced once the new one is whole.
        images: (n, 3, H, W), uint8 or float in [0, 1].
        labels: (n,) integers.
        rounding: how floats become bytes.

    Raises:
        ValueError: shapes don't fit.
        StorageFault: the disk is full or refuses.
    """
    path = Path(path)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are (n, 3, H, W), not {tuple(images.shape)}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels are ({len(images)},), not {tuple(labels.shape)}")
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as stream:
                _write(stream, images, rounding)
            if labels is not None:
                with file.open("arr_1.npy", "w") as stream:
                    np.lib.format.write_array(stream, labels.cpu().long().numpy(), allow_pickle=False)
        temporary.replace(path)
    except OSError as error:
        raise StorageFault(f"{path} could not be written: {reason(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write(stream: IO[bytes], images: Tensor, rounding: Rounding, rows: int = 256) -> None:
    n, channels, height, width = images.shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, height, width, channels)}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in images.split(rows):
        stream.write(to_bytes(part, rounding).permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())


def _header(stream: IO[bytes]) -> tuple[int, int, int, int]:
    """Shape of ``arr_0``; the stream then stands at its first byte."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
        raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (n, H, W, 3)")
    return shape[0], shape[1], shape[2], shape[3]
