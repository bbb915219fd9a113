"""Where images to be measured come from: tensors, a folder of pictures, an npz in ADM's layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from vtp_core.data.pictures import BROKEN, SUFFIXES, decode
from vtp_core.errors import DataFault, StackFault
from vtp_fidelity.frechet import Gaussian
from vtp_fidelity.npz import Npz
from vtp_fidelity.pixels import CROPS, Crop, Rounding, to_bytes


class Source(Protocol):
    """Images of one size, or statistics of some: what a metric compares."""

    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def gaussian(self) -> Gaussian | None: ...
    @property
    def identity(self) -> str:
        """Short hash of what the images are."""
        ...

    def __len__(self) -> int: ...
    def batches(self, rows: int) -> Iterator[Tensor]:
        """Images (rows, 3, H, W) uint8."""
        ...


class InMemory:
    """Images in memory.

    Args:
        images: (n, 3, H, W), uint8 or float in [0, 1].
        labels: (n,) integers.
        rounding: how floats become bytes.

    Raises:
        ArithmeticError: some pixels are not finite.
    """

    gaussian: Gaussian | None = None

    def __init__(self, images: Tensor, labels: Tensor | None = None, rounding: Rounding = "round") -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"images are (n, 3, H, W), one at least, not {tuple(images.shape)}")
        self.images, self.labels = to_bytes(images, rounding).cpu(), labels
        self.size = (images.shape[2], images.shape[3])

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rows: int) -> Iterator[Tensor]:
        yield from self.images.split(rows)


class Folder:
    """Pictures under a folder, in the order of their paths.

    Args:
        root: the folder; sub-folders count too.
        size: side of the square that every picture of another size is cropped to; without it all
            pictures must have one size.
        crop: how.
    """

    labels: Tensor | None = None
    gaussian: Gaussian | None = None

    def __init__(self, root: Path, size: int | None = None, crop: Crop = "adm") -> None:
        self.root, self._side, self._crop = root, size, crop
        self._paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self._paths:
            raise DataFault(f"{root} holds no pictures ({' '.join(SUFFIXES)})")
        first = self._picture(self._paths[0])
        self.size = (first.shape[1], first.shape[2])

    @property
    def identity(self) -> str:
        lines = [f"{p.relative_to(self.root).as_posix()} {p.stat().st_size}" for p in self._paths]
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self._paths)

    def batches(self, rows: int) -> Iterator[Tensor]:
        for start in range(0, len(self._paths), rows):
            yield torch.stack([self._checked(path) for path in self._paths[start : start + rows]])

    def _checked(self, path: Path) -> Tensor:
        image = self._picture(path)
        if image.shape[1:] != self.size:
            raise StackFault(
                f"{path} is {image.shape[1]}x{image.shape[2]}, {self._paths[0].name} is {self.size[0]}x"
                f"{self.size[1]}; --size N --crop adm makes all of them N x N"
            )
        return image

    def _picture(self, path: Path) -> Tensor:
        try:
            image = decode(path.read_bytes(), str(path))
        except BROKEN as error:
            raise DataFault(str(error)) from error
        if self._side is None or image.shape[1:] == (self._side, self._side):
            return image
        picture: Image.Image = to_pil_image(image)
        cropped: Tensor = pil_to_tensor(CROPS[self._crop](picture, self._side))
        return cropped


def opened(
    source: Any, *, size: int | None = None, crop: Crop = "adm", rounding: Rounding = "round"
) -> Source:
    """A source from what people have: a tensor, a path of a folder or an npz, or a source.

    Args:
        source: images (n, 3, H, W), or a path.
        size: side that pictures of a folder are cropped to.
        crop: how they are.
        rounding: how floats become bytes.

    Raises:
        DataFault: nothing readable is there.
    """
    if isinstance(source, Tensor):
        return InMemory(source, rounding=rounding)
    if not isinstance(source, str | Path):
        found: Source = source
        return found
    path = Path(source).expanduser()
    if path.is_dir():
        return Folder(path, size, crop)
    if path.suffix == ".npz" and path.is_file():
        return Npz(path)
    raise DataFault(f"{path} is neither a folder of pictures nor an .npz")
