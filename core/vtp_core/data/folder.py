"""A folder of pictures: sub-folders are classes, a caption lies beside its picture as ``.txt``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from vtp_core.data.order import key, permutation
from vtp_core.data.pictures import MAX_PIXELS, SUFFIXES, BadSample, decode
from vtp_plugins.errors import DataFault
from vtp_plugins.spec import Spec

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "test")


class ImageFolder:
    """Pictures under a folder, with classes and captions where there are any.

    Folders ``train`` and ``val`` are the splits; without them a share of the pictures, chosen by their
    paths, is held out as ``val``.

    Args:
        spec: shapes of the tokenizer.
        split: ``train`` or ``val``.
        root: the folder.
        holdout: share held out where there is no ``val`` folder.
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
        root: str,
        holdout: Annotated[float, Field(ge=0, lt=1)] = 0.05,
        short_side: Annotated[int, Field(ge=0)] | None = None,
        max_pixels: Annotated[int, Field(gt=0)] = MAX_PIXELS,
    ) -> None:
        top = Path(root).expanduser()
        if not top.is_dir():
            what = "; it is a file, and a folder of pictures is wanted" if top.is_file() else ""
            raise DataFault(f"data.root: there is no folder {root!r}{what}")
        self.splits: tuple[str, ...] = ("train", "val") if holdout or child(top, VALIDATION) else ("train",)
        if split not in self.splits:
            raise ValueError(f"data: the folder has no split {split!r}; it has {', '.join(self.splits)}")
        self.split, self.max_pixels = split, max_pixels
        self.short_side = 2 * max(spec.size) if short_side is None else short_side
        trained = child(top, TRAIN) or top
        separate = child(top, VALIDATION)
        self.root = separate if split == "val" and separate is not None else trained
        apart = separate if separate is not None and self.root == top else None
        paths, captioned = indexed(self.root, apart)
        if separate is None and holdout:
            paths = [p for p in paths if held_out(p, holdout) == (split == "val")]
        if not paths:
            kinds = " ".join(SUFFIXES)
            raise DataFault(f"data.root: {self.root} holds no pictures ({kinds}) for split {split!r}")
        # one block of memory, which forked workers do not copy as they do objects
        self._paths = np.array([os.fsencode(p) for p in paths])
        classes = folders(trained, apart)
        self._classes = {name: i for i, name in enumerate(classes)}
        self.names: Mapping[str, Sequence[str]] = {"label": classes} if classes else {}
        held = {"image", "name"} | ({"label"} if classes else set()) | ({"text"} if captioned else set())
        self.fields = frozenset(held)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = os.fsdecode(self._paths[index])
        path = self.root / name
        image = decode(contents(path, name), name, self.short_side, self.max_pixels)
        first, inside, _ = name.partition("/")
        sample: dict[str, Any] = {"image": image, "name": name}
        sample["label"] = self._classes.get(first) if inside else None
        sample["text"] = caption(path.with_suffix(".txt"), name) if "text" in self.fields else None
        return sample

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """A fresh permutation each epoch."""
        return permutation(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """Hash over the paths and sizes of the pictures."""
        digest = hashlib.sha256(self.split.encode())
        for raw in self._paths:
            name = os.fsdecode(raw)
            digest.update(f"{name}\0{size(self.root / name)}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def contents(path: Path, name: str) -> bytes:
    """Bytes of a picture's file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("cannot be read", name, error.strerror or str(error)) from error


def size(path: Path) -> int:
    """Bytes of a file; -1 for a link to nothing, or a file that has gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def child(top: Path, names: Sequence[str]) -> Path | None:
    """The first sub-folder that bears one of the names."""
    return next((top / name for name in names if (top / name).is_dir()), None)


def folders(top: Path, apart: Path | None) -> list[str]:
    """Names of the classes: sub-folders, in alphabetical order."""
    names = (entry.name for entry in os.scandir(top) if entry.is_dir() and not entry.name.startswith("."))
    return sorted(name for name in names if apart is None or name != apart.name)


def indexed(top: Path, apart: Path | None) -> tuple[list[str], bool]:
    """Paths of all pictures below ``top``, sorted, and whether any has a caption; links are followed once."""
    found: list[str] = []
    captioned = False
    for folder, files in walked(top, apart):
        names = set(files)
        prefix = "" if folder == top else f"{folder.relative_to(top).as_posix()}/"
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES and not name.startswith("."):
                found.append(prefix + name)
                captioned = captioned or f"{stem}.txt" in names
    return sorted(found), captioned


def walked(top: Path, apart: Path | None) -> Iterator[tuple[Path, list[str]]]:
    """Folders below ``top`` with their files, but for ``apart`` and hidden ones."""
    met: set[tuple[int, int]] = set()
    for folder, inside, files in os.walk(top, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in met or (apart is not None and Path(folder) == apart):
            inside.clear()
            continue
        met.add((here.st_dev, here.st_ino))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield Path(folder), files


def held_out(path: str, share: float) -> bool:
    """Whether a picture belongs to ``val``, by its path alone."""
    return key("holdout", path, size=8) < share * 2**64


def caption(path: Path, name: str) -> str | None:
    """The text beside a picture; None without one."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8", name, str(error)) from error
    return text or None
