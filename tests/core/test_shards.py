"""Webdataset shards: what is written is read, broken shards are found whole, nothing is run or unpacked."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vtp_core.data.loader import Loader
from vtp_core.data.manifest import NAME, expanded, read_manifest, write_manifest
from vtp_core.data.pictures import BadSample
from vtp_core.data.shards import Shards
from vtp_core.data.tar import read_index
from vtp_core.data.views import Plain
from vtp_plugins.errors import DataFault
from vtp_plugins.protocols import Dataset
from vtp_plugins.spec import Spec

SPEC = Spec(size=(16, 16), patch=(4, 4))


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(number: int) -> list[tuple[str, bytes]]:
    key = f"{number:04d}"
    return [(f"{key}.png", png(number)), (f"{key}.txt", f"number {number}".encode()), (f"{key}.cls", b"3")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(4):
        write(tmp_path / f"s-{shard:02d}.tar", [f for i in range(5) for f in sample(5 * shard + i)])
    write_manifest(tmp_path)
    return tmp_path


def test_samples_come_by_index_in_the_shards_order(folder: Path) -> None:
    data = Shards(SPEC, path=str(folder))
    assert isinstance(data, Dataset)
    assert len(data) == 20
    assert data.fields == {"image", "text", "label", "name"}
    for i in (0, 7, 19, 7):
        assert data[i]["image"].eq(i).all()
        assert (data[i]["text"], data[i]["label"]) == (f"number {i}", 3)
    assert data[7]["name"] == "s-01.tar, sample 2"
    assert sorted(data.order(0, 0)) == list(range(20))


def test_the_members_are_the_ones_that_webdataset_reads(folder: Path) -> None:
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    theirs = list(webdataset.WebDataset(str(folder / "s-01.tar"), shardshuffle=False))
    raw = (folder / "s-01.tar").read_bytes()
    ours = [{k: raw[o : o + n] for k, (o, n) in s.items()} for s in read_index(folder / "s-01.tar")]
    assert ours == [{k: v for k, v in s.items() if not k.startswith("__")} for s in theirs]


def test_the_manifest_says_what_each_shard_is(folder: Path) -> None:
    (folder / "classes.txt").write_text("a\nb\n")
    target = write_manifest(str(folder / "s-{00..03}.tar"))
    shards, names = read_manifest(folder)
    assert target == folder / NAME
    assert names == {"label": ["a", "b"]}
    assert [s.samples for s in shards.values()] == [5] * 4
    assert shards["s-00.tar"].bytes == (folder / "s-00.tar").stat().st_size
    assert shards["s-00.tar"].fields == ("image", "label", "text")
    assert sorted(p.name for p in folder.iterdir()) == sorted([NAME, "classes.txt", *shards])


def test_captions_in_json_are_read(tmp_path: Path) -> None:
    table = json.dumps({"caption": "a cat", "label": 4}).encode()
    write(tmp_path / "a.tar", [("1.png", png(1)), ("1.json", table), ("2.png", png(2))])
    write_manifest(tmp_path)
    data = Shards(SPEC, path=str(tmp_path / "a.tar"))
    assert data.fields == {"image", "text", "label", "name"}
    assert (data[0]["text"], data[0]["label"]) == ("a cat", 4)
    assert (data[1]["text"], data[1]["label"]) == (None, None)


def test_the_last_samples_of_every_shard_are_held_out_or_other_shards_are(folder: Path) -> None:
    train, val = (Shards(SPEC, s, path=str(folder), holdout=0.2) for s in ("train", "val"))
    assert (len(train), len(val)) == (16, 4)
    assert [int(val[i]["image"][0, 0, 0]) for i in range(4)] == [4, 9, 14, 19]
    other = Shards(SPEC, "val", path=str(folder / "s-{00..02}.tar"), val=str(folder / "s-03.tar"))
    assert [int(other[i]["image"][0, 0, 0]) for i in range(5)] == [15, 16, 17, 18, 19]
    assert train.fingerprint() != val.fingerprint()


def test_few_shards_stay_open_and_a_copy_opens_its_own(folder: Path) -> None:
    import pickle

    data = Shards(SPEC, path=str(folder), open_shards=2)
    assert [int(data[i]["image"][0, 0, 0]) for i in range(20)] == list(range(20))
    assert len(data._open) == 2
    assert pickle.loads(pickle.dumps(data))[3]["text"] == "number 3"


def readable(data: Shards) -> list[int]:
    found = []
    for i in range(len(data)):
        try:
            found.append(int(data[i]["image"][0, 0, 0]))
        except BadSample:
            continue
    return found


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 1536, 4096, 10_000])
def test_a_truncated_shard_is_never_half_used(folder: Path, keep: int) -> None:
    path = folder / "s-01.tar"
    path.write_bytes(path.read_bytes()[:keep])
    data = Shards(SPEC, path=str(folder))
    assert readable(data) == [*range(5), *range(10, 20)]
    with pytest.raises(BadSample, match=r"s-01.tar: truncated shard .*the manifest says") as caught:
        data[5]
    assert caught.value.reason == "truncated shard"


def test_no_flipped_byte_passes_the_full_check(folder: Path) -> None:
    path = folder / "s-02.tar"
    whole = path.read_bytes()
    for place in range(0, len(whole), 1999):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert readable(Shards(SPEC, path=str(folder), verify="full")) == [*range(10), *range(15, 20)]


@pytest.mark.parametrize("keep", [300, 1536, 2048, 5120, 9216])
def test_truncations_are_found_even_when_no_manifest_knows_better(folder: Path, keep: int) -> None:
    path = folder / "s-00.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataFault, match=r"s-00.tar"):
        write_manifest(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("../a.png", png(0))], "unsafe member name"),
        ([("/tmp/a.png", png(0))], "unsafe member name"),
        ([("a.png", png(0)), ("a.pkl", b"cos\nsystem\n(S'true'\ntR.")], "pickled member"),
        ([("a.png", png(0)), ("a.seg.pth", b"x")], "pickled member"),
        ([("a.png", png(0)), ("b.png", png(0)), ("a.txt", b"x")], "interleaved samples"),
        ([("a.png", png(0)), ("a.png", png(1))], "broken shard"),
        ([], "empty shard"),
    ],
)
def test_members_that_harm_or_mislead_are_refused(tmp_path: Path, files: Any, reason: str) -> None:
    path = write(tmp_path / "a.tar", files)
    with pytest.raises(BadSample) as caught:
        read_index(path)
    assert caught.value.reason == reason
    with pytest.raises(DataFault, match=r"repair or remove the shard"):
        write_manifest(tmp_path)


def test_links_and_html_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "b.tar").write_bytes(b"<html>" * 400)
    for name, reason in (("a.tar", "empty shard"), ("b.tar", "broken shard")):
        with pytest.raises(BadSample) as caught:
            read_index(tmp_path / name)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    "path",
    [
        "pipe:cat a.tar", "PIPE:x", " pipe:cat a.tar", "http://host/a.tar", "s3://b/a.tar", "file:///etc/passwd",
        "-", "", "%2e%2e/a.tar", "a.tar.gz", "{0..99999999}.tar", "{5..2}.tar", "/etc/passwd", "nowhere.tar",
        "a|b.tar", "..tar",
    ],
)  # fmt: skip
def test_only_local_tars_are_opened(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFault, match=r"data\.path"):
        expanded(path)


def test_a_pattern_keeps_its_zeros(folder: Path) -> None:
    assert [p.name for p in expanded(str(folder / "s-{01..03}.tar"))] == ["s-01.tar", "s-02.tar", "s-03.tar"]


def test_a_missing_or_foreign_manifest_names_the_command(folder: Path) -> None:
    write(folder / "new.tar", sample(1))
    with pytest.raises(DataFault, match=r"new.tar is not in the manifest; write it with `vtp data manifest"):
        Shards(SPEC, path=str(folder))
    for text in ("{", "[]", '{"format": "other"}', '{"format": "vtp shards 1", "shards": [{"name": "x"}]}'):
        (folder / NAME).write_text(text)
        with pytest.raises(DataFault, match=r"cannot be read.*vtp data manifest"):
            Shards(SPEC, path=str(folder))
    (folder / NAME).unlink()
    with pytest.raises(DataFault, match=r"has no manifest.json; write it with `vtp data manifest"):
        Shards(SPEC, path=str(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_passes_over_a_broken_shard_and_names_it(folder: Path, workers: int) -> None:
    path = folder / "s-01.tar"
    path.write_bytes(path.read_bytes()[:-1])
    data = Shards(SPEC, path=str(folder))
    options: dict[str, Any] = {"batch_size": 10, "stop": 4, "workers": workers}
    loader = Loader(data, {"plain": Plain(SPEC)}, {"plain": 10}, max_bad_fraction=1.0, **options)
    seen = torch.cat([b.ids for b in loader])
    assert not ((seen >= 5) & (seen < 10)).any()
    assert set(loader.bad) == {"truncated shard"}
    assert list(loader.quarantine) == ["s-01.tar"]
