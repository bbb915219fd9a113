"""Where the samples of a webdataset shard lie: headers are read once, members by offset, none is unpacked."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vtp_core.data.pictures import SUFFIXES, BadSample

Member = tuple[int, int]
Index = list[dict[str, Member]]

IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
# webdataset would unpickle these
REFUSED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "cbor", "ten", "tb"})
MAX_MEMBER = 64 << 20
MAX_TEXT = 1 << 20
BLOCK = 512


def members(shard: Path) -> Iterator[dict[str, Any]]:
    """Regular files of a shard, in the form that webdataset groups; their data is (offset, size)."""
    end = shard.stat().st_size
    with tarfile.open(shard, mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            path, place = PurePosixPath(member.name), f"{shard.name}, byte {member.offset}"
            if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
                raise BadSample("unsafe member name", place, ascii(member.name)[:80])
            if member.name.rpartition(".")[2].lower() in REFUSED:
                raise BadSample("pickled member", place, ascii(member.name)[:80])
            if member.offset_data + member.size > end:
                raise BadSample("truncated shard", place)
            tar.members = []  # type: ignore[attr-defined] # or tarfile keeps every header
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": shard.name}
        rest = tar.offset
    with shard.open("rb") as stream:
        stream.seek(rest)
        if stream.read(BLOCK) != bytes(BLOCK):  # tarfile ends quietly at a header that it cannot read
            raise BadSample(
                "broken shard", f"{shard.name}, byte {rest}", "no tar header and no end of archive"
            )


def read_index(shard: Path) -> Index:
    """Samples of a shard, each member's (offset, size) by extension, in the shard's order.

    Raises:
        BadSample: the shard is truncated or no tar, a key comes twice, or a member is refused.
    """
    os.environ["WDS_SECURE"] = "1"  # webdataset reads it when imported: no pipes, no pickles
    from webdataset.tariterators import group_by_keys

    index: Index = []
    keys: set[str] = set()
    try:
        for sample in group_by_keys(members(shard)):
            name = sample.pop("__key__")
            if name in keys:
                raise BadSample("interleaved samples", shard.name, f"key {ascii(name)[:80]} comes back")
            keys.add(name)
            index.append({k: v for k, v in sample.items() if not k.startswith("__")})
    except BadSample:
        raise
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        raise BadSample("broken shard", shard.name, str(error.args[0] if error.args else error)) from error
    if not index:
        raise BadSample("empty shard", shard.name)
    return index


def read_member(descriptor: int, member: Member, name: str, most: int = MAX_MEMBER) -> bytes:
    """Bytes of a member; by offset, so that forked processes may share the open file."""
    offset, size = member
    if size > most:
        raise BadSample("member too large", name, f"{size} bytes, the limit is {most}")
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise BadSample("truncated shard", name)
    return data


def text_fields(descriptor: int, sample: dict[str, Member], name: str) -> dict[str, Any]:
    """``text`` and ``label`` of a sample out of its ``txt``, ``cls`` and ``json`` members."""
    found: dict[str, Any] = {"text": None, "label": None}
    try:
        if "json" in sample:
            table = json.loads(read_member(descriptor, sample["json"], name, MAX_TEXT))
            text, label = table.get("caption", table.get("text")), table.get("label")
            found["text"] = text if isinstance(text, str) else None
            found["label"] = label if type(label) is int else None
        if "txt" in sample:
            found["text"] = read_member(descriptor, sample["txt"], name, MAX_TEXT).decode().strip() or None
        if "cls" in sample:
            found["label"] = int(read_member(descriptor, sample["cls"], name, MAX_TEXT))
    except BadSample:
        raise
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSample("broken text", name, str(error)) from error
    return found


def fields_of(shard: Path, index: Index) -> tuple[str, ...]:
    """Fields that the samples of a shard have; what ``json`` members hold is judged by the first."""
    extensions = set().union(*index)
    fields = {"image"} if extensions & IMAGES else set()
    fields |= {field for extension, field in (("txt", "text"), ("cls", "label")) if extension in extensions}
    first = next((sample for sample in index if "json" in sample), None)
    if first is not None:
        with shard.open("rb") as stream:
            found = text_fields(stream.fileno(), {"json": first["json"]}, shard.name)
        fields |= {field for field, value in found.items() if value is not None}
    return tuple(sorted(fields))
