"""Regenerate the atlas: three WebP sheets and concepts.json, from the npm packages that hold the artwork.

npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
python build_atlas.py --packages . --out vtp_emoji
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TILE = 64
QUALITY = 92
HELD_OUT = 0.1
ARCHIVES = {
    "google": "emoji-datasource-google-16.0.0.tgz",
    "fluent": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "twitter": "emoji-datasource-twitter-16.0.0.tgz",
}
RENAMED = {"0023-FE0F-20E3": "keycap #", "1F935": "person in tuxedo", "1F935-200D-2642-FE0F": "man in tuxedo"}
IDEOGRAPHS = {  # the source spells these by code point only; the meanings are Unicode's CLDR short names
    "1F21A": "japanese free of charge button",
    "1F22F": "japanese reserved button",
    "1F232": "japanese prohibited button",
    "1F233": "japanese vacancy button",
    "1F234": "japanese passing grade button",
    "1F235": "japanese no vacancy button",
    "1F236": "japanese not free of charge button",
    "1F237": "japanese monthly amount button",
    "1F238": "japanese application button",
    "1F239": "japanese discount button",
    "1F23A": "japanese open for business button",
}


def members(archive: Path) -> dict[str, bytes]:
    """Files of an npm archive that the atlas needs, by their path inside ``package/``."""
    wanted = re.compile(r"package/(emoji\.json|LICENSE|img/\w+/64/[\w-]+\.png|assets/[\w-]+\.webp)")
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg() and wanted.fullmatch(member.name):
                stream = tar.extractfile(member)
                assert stream is not None
                found[member.name.removeprefix("package/")] = stream.read()
    return found


def caption(row: dict[str, Any]) -> str:
    """A readable lower-case name: 'family: man, woman, girl', 'flag of aruba', 'keycap 3'."""
    code = row["unified"]
    if code in RENAMED | IDEOGRAPHS:
        return (RENAMED | IDEOGRAPHS)[code]
    name = row["name"].replace("’", "'").lower()
    name = re.sub(r"^keycap: ", "keycap ", name)
    if row["subcategory"] == "country-flag" and name.endswith(" flag"):
        name = f"flag of {name.removesuffix(' flag')}"
    return name


def fluent_path(code: str, files: dict[str, bytes]) -> str | None:
    """Path of the Fluent render of a code point sequence; the package is uneven about variation selectors."""
    low = code.lower()
    for candidate in (low, low.replace("-fe0f", ""), f"{low}-fe0f"):
        if f"assets/{candidate}.webp" in files:
            return f"assets/{candidate}.webp"
    return None


def tile(data: bytes) -> Image.Image:
    """One emoji on white, 64 px; composited before it is scaled, so edges keep no dark fringe."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    rgb = white.convert("RGB")
    return rgb if rgb.size == (TILE, TILE) else rgb.resize((TILE, TILE), Image.Resampling.LANCZOS)


def held_out(tiles: dict[str, list[np.ndarray[Any, Any]]], codes: list[str]) -> list[int]:
    """Concepts kept from training: the tenth whose digest is lowest. Concepts drawn alike go together."""
    leader = list(range(len(codes)))
    for style in tiles.values():  # Norway's flag also stands for Svalbard and Bouvet Island
        first: dict[bytes, int] = {}
        for i, picture in enumerate(style):
            j = first.setdefault(picture.tobytes(), i)
            low, high = sorted((leader[i], leader[j]))
            leader = [low if k == high else k for k in leader]
    digests = [hashlib.sha256(f"vtp-emoji {codes[k]}".encode()).hexdigest() for k in leader]
    ranked = sorted(range(len(codes)), key=lambda i: (digests[i], i))
    count = round(HELD_OUT * len(codes))
    while digests[ranked[count]] == digests[ranked[count - 1]]:
        count += 1
    print(f"{sum(k != i for i, k in enumerate(leader))} concepts share a drawing with an earlier one")
    return sorted(ranked[:count])


def sheet(pictures: list[np.ndarray[Any, Any]], columns: int) -> Image.Image:
    """All tiles of one style, row after row."""
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((rows * TILE, columns * TILE, 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = TILE * (i // columns), TILE * (i % columns)
        canvas[top : top + TILE, left : left + TILE] = picture
    return Image.fromarray(canvas)


def build(packages: Path, out: Path) -> None:
    """Write ``<style>.webp`` and ``concepts.json`` into ``out``."""
    files = {style: members(packages / name) for style, name in ARCHIVES.items()}
    rows = json.loads(files["google"]["emoji.json"])
    rows.sort(key=lambda row: row["sort_order"])
    kept, tiles = [], {style: [] for style in ARCHIVES}  # type: ignore[var-annotated]
    for row in rows:
        paths = {
            "google": f"img/google/64/{row['image']}",
            "fluent": fluent_path(row["unified"], files["fluent"]),
            "twitter": f"img/twitter/64/{row['image']}",
        }
        if all(path in files[style] for style, path in paths.items()):
            kept.append(row)
            for style, path in paths.items():
                tiles[style].append(np.asarray(tile(files[style][path])))  # type: ignore[index]
    columns = math.ceil(math.sqrt(len(kept)))
    for style, pictures in tiles.items():
        sheet(pictures, columns).save(out / f"{style}.webp", quality=QUALITY, method=6)
    codes = [row["unified"] for row in kept]
    categories = sorted({row["category"] for row in kept})
    labels = sorted({row["subcategory"] for row in kept})
    captions = [caption(row) for row in kept]
    table = {
        "tile": TILE,
        "columns": columns,
        "categories": [name.replace("&", "and").lower() for name in categories],
        "labels": [name.replace("&", "and").replace("-", " ") for name in labels],
        "unseen": held_out(tiles, codes),
        "codes": codes,
        "captions": captions,
        "category": [categories.index(row["category"]) for row in kept],
        "label": [labels.index(row["subcategory"]) for row in kept],
    }
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in table.items())
    (out / "concepts.json").write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    print(f"{len(kept)} concepts, {len(labels)} labels, {len(kept) - len(set(captions))} captions twice")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the three .tgz files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vtp_emoji")
    arguments = parser.parse_args()
    build(arguments.packages, arguments.out)
