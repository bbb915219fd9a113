"""A folder of pictures: classes, captions, splits, every kind of file, and none that harms."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_core.data.folder import ImageFolder
from vtp_core.data.loader import Loader
from vtp_core.data.pictures import BadSample, decode
from vtp_core.data.views import Plain
from vtp_plugins.errors import DataFault
from vtp_plugins.protocols import Dataset
from vtp_plugins.spec import Spec

SPEC = Spec(size=(16, 16), patch=(4, 4))
RED = (220, 30, 40)


def save(path: Path, size: tuple[int, int] = (20, 12), colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("cat", "dog"):
        for i in range(10):
            save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "0.txt").write_text(f" a {name}\n")
    return tmp_path


def test_sub_folders_are_classes_and_text_beside_a_picture_is_its_caption(root: Path) -> None:
    data = ImageFolder(SPEC, root=str(root), holdout=0)
    assert isinstance(data, Dataset)
    assert data.fields == {"image", "text", "label", "name"}
    assert data.names == {"label": ["cat", "dog"]}
    assert len(data) == 20
    first, last = data[0], data[19]
    assert (first["text"], first["label"], first["name"]) == ("a cat", 0, "cat/0.png")
    assert (last["text"], last["label"]) == (None, 1)
    assert first["image"].dtype == torch.uint8
    assert first["image"][:, 0, 0].tolist() == list(RED)


def test_without_folders_or_captions_there_are_no_such_fields(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    data = ImageFolder(SPEC, root=str(tmp_path), holdout=0)
    assert data.fields == {"image", "name"}
    assert data.names == {}
    assert data[0]["label"] is None


def test_a_share_is_held_out_by_path_alone(root: Path) -> None:
    train, val = (ImageFolder(SPEC, split, root=str(root), holdout=0.3) for split in ("train", "val"))
    names = [{data[i]["name"] for i in range(len(data))} for data in (train, val)]
    assert names[0].isdisjoint(names[1])
    assert len(names[0] | names[1]) == 20
    assert 1 <= len(names[1]) <= 12
    save(root / "cat" / "new.png")
    again = ImageFolder(SPEC, "val", root=str(root), holdout=0.3)
    assert names[1] <= {again[i]["name"] for i in range(len(again))}
    assert train.fingerprint() != val.fingerprint()


def test_folders_named_train_and_val_are_the_splits(root: Path, tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            save(tmp_path / "both" / split / "dog" / f"{i}.png")
    train, val = (ImageFolder(SPEC, split, root=str(tmp_path / "both")) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    assert train.names == val.names == {"label": ["dog"]}
    (tmp_path / "both" / "train").rename(tmp_path / "both" / "dog")
    beside = ImageFolder(SPEC, root=str(tmp_path / "both"))
    assert len(beside) == 3
    assert beside.names == {"label": ["dog"]}


def test_a_missing_or_empty_folder_is_a_data_fault(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="no folder"):
        ImageFolder(SPEC, root=str(tmp_path / "nowhere"))
    with pytest.raises(DataFault, match="holds no pictures"):
        ImageFolder(SPEC, root=str(tmp_path))
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no split 'test'"):
        ImageFolder(SPEC, "test", root=str(tmp_path))


def test_a_loop_of_links_is_walked_once(root: Path) -> None:
    (root / "cat" / "again").symlink_to(root)
    assert len(ImageFolder(SPEC, root=str(root), holdout=0)) == 20


def test_large_pictures_are_shrunk_to_between_twice_and_four_times_the_size_unless_told_otherwise(
    tmp_path: Path,
) -> None:
    save(tmp_path / "a.jpg", (400, 300))
    save(tmp_path / "b.png", (400, 300))
    save(tmp_path / "c.png", (63, 200))
    options = {"root": str(tmp_path), "holdout": 0}
    shapes = [ImageFolder(SPEC, **options)[i]["image"].shape[1:] for i in range(3)]  # type: ignore[arg-type]
    assert shapes == [(38, 50), (34, 45), (200, 63)]
    whole = ImageFolder(SPEC, **options, short_side=0)  # type: ignore[arg-type]
    assert whole[0]["image"].shape == (3, 300, 400)


def encoded(image: Image.Image, path: Path, **options: object) -> torch.Tensor:
    image.save(path, **options)  # type: ignore[arg-type]
    return decode(path.read_bytes(), path.name)


def test_transparent_pictures_are_composited_on_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert encoded(rgba, tmp_path / "a.png").eq(255).all()
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([7] * 768)
    assert encoded(palette, tmp_path / "b.png", transparency=3).eq(255).all()
    assert encoded(palette, tmp_path / "c.png").eq(7).all()


def test_odd_modes_become_colour(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((4, 4), 257 * 90, dtype=np.uint16))
    assert encoded(deep, tmp_path / "a.png").eq(90).all()
    assert encoded(Image.new("L", (4, 4), 90), tmp_path / "b.png").eq(90).all()
    assert encoded(Image.new("1", (4, 4), 1), tmp_path / "c.png").eq(255).all()
    cmyk = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "d.jpg")
    assert (cmyk[:, 4, 4] - torch.tensor([255, 0, 0], dtype=torch.uint8)).float().abs().min() < 30
    assert cmyk[0, 4, 4] > 200 > 60 > cmyk[1, 4, 4]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    assert encoded(frames[0], tmp_path / "e.gif", save_all=True, append_images=frames[1:])[0].eq(255).all()


def test_pictures_are_turned_the_right_way_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (40, 20), RED)
    assert encoded(picture, tmp_path / "a.jpg", exif=exif).shape == (3, 40, 20)


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def noise() -> bytes:
    from io import BytesIO

    stream = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        stream, "JPEG"
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "empty file"),
        (lambda: b"<html>404</html>", "not a picture"),
        (lambda: noise()[:1500], "truncated"),
        (bomb, "too large"),
    ],
)
def test_broken_pictures_say_what_is_wrong(make: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode(make(), "x.jpg")
    assert caught.value.reason == reason
    assert "x.jpg" in str(caught.value)


def test_the_pixel_limit_holds_before_anything_is_decoded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", (30, 30))
    with pytest.raises(BadSample, match="30 x 30, the limit is 800 pixels"):
        decode(path.read_bytes(), "a.png", max_pixels=800)


def test_a_loader_counts_each_kind_of_broken_picture(root: Path) -> None:
    (root / "cat" / "1.png").write_bytes(b"")
    (root / "cat" / "2.png").write_bytes(b"<html>")
    (root / "dog" / "3.png").write_bytes(bomb())
    data = ImageFolder(SPEC, root=str(root), holdout=0)
    rows = {"plain": 10, "text": 0}
    loader = Loader(data, {"plain": Plain(SPEC)}, rows, batch_size=10, stop=2, max_bad_fraction=1.0)
    assert [b.values["plain"].shape for b in loader] == [(10, 1, 3, 16, 16)] * 2
    assert {"empty file", "not a picture", "too large"} == set(loader.bad)
    assert set(loader.quarantine) == {"cat/1.png", "cat/2.png", "dog/3.png"}
