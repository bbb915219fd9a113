"""The emoji atlas: its splits, its captions, and pictures that are what their captions say."""

from __future__ import annotations

import time

import pytest
import torch

import vtp_emoji
from vtp_emoji import STYLES, Emoji
from vtp_plugins.protocols import Dataset
from vtp_plugins.spec import Spec

SPLITS = {"train": 3334, "unseen_style": 1667, "unseen_concept": 555}


def test_it_is_a_dataset_with_the_sizes_of_the_readme() -> None:
    assert isinstance(Emoji(Spec()), Dataset)
    assert {split: len(Emoji(Spec(), split)) for split in Emoji.splits} == SPLITS
    with pytest.raises(ValueError, match="no split 'test'"):
        Emoji(Spec(), "test")


def test_splits_share_no_picture_and_unseen_concepts_are_never_trained_on() -> None:
    pairs = {
        s: {(Emoji(split=s)[i]["concept"], Emoji(split=s)[i]["style"]) for i in range(n)}
        for s, n in SPLITS.items()
    }
    assert sum(len(p) for p in pairs.values()) == len(set.union(*pairs.values())) == 3 * 1852
    trained = {concept for concept, _ in pairs["train"]}
    assert trained == {concept for concept, _ in pairs["unseen_style"]}
    assert trained.isdisjoint(concept for concept, _ in pairs["unseen_concept"])
    assert {style for _, style in pairs["train"]} == {0, 1}
    assert {style for _, style in pairs["unseen_style"]} == {2}


def test_a_concept_drawn_alike_is_not_split() -> None:
    unseen = set(vtp_emoji.concepts()["unseen"])
    for style in STYLES:
        groups: dict[bytes, set[bool]] = {}
        for i, tile in enumerate(vtp_emoji.tiles(style)):
            groups.setdefault(tile.numpy().tobytes(), set()).add(i in unseen)
        assert all(len(sides) == 1 for sides in groups.values())


def test_samples_are_whole_and_their_names_agree() -> None:
    data = Emoji()
    for i in range(0, len(data), 97):
        sample = data[i]
        assert sample["image"].shape == (3, 64, 64)
        assert sample["image"].dtype == torch.uint8
        assert data.names["concept"][sample["concept"]] == sample["text"]
        assert data.texts([i]) == [sample["text"]]
        assert set(sample) == data.fields
    with pytest.raises(IndexError):
        data[len(data)]


def test_captions_are_readable_and_their_own() -> None:
    captions = vtp_emoji.concepts()["captions"]
    assert len(set(captions)) == len(captions) == 1852
    assert all(c == c.lower().strip() and "_" not in c and "  " not in c and c for c in captions)
    assert len(Emoji().names["category"]) == 9
    assert len(Emoji().names["label"]) == 97
    assert {"grapes", "flag of japan", "keycap 3", "family: man, woman, girl"} <= set(captions)


def mean_colour(caption: str, style: str) -> list[float]:
    tile = vtp_emoji.tiles(style)[vtp_emoji.concepts()["captions"].index(caption)].float()
    inked = tile.amin(0) < 200
    return [round(c) for c in tile[:, inked].mean(1).tolist()]


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_what_their_captions_say(style: str) -> None:
    red, green, blue = mean_colour("large red circle", style)
    assert red > 180 > 110 > max(green, blue)
    red, green, blue = mean_colour("green apple", style)
    assert green > red > blue
    red, green, blue = mean_colour("large blue circle", style)
    assert blue > green > red


def test_pictures_lie_on_white() -> None:
    corners = torch.stack([vtp_emoji.tiles(s)[:, :, ::63, ::63] for s in STYLES]).flatten(3)
    light = (corners.amin(2) > 235).float().mean()
    assert light > 0.7
    assert (corners.amax(2) < 20).float().mean() < 0.02


def test_the_atlas_is_decoded_once_and_quickly_and_handed_out_as_copies() -> None:
    vtp_emoji.tiles.cache_clear()
    start = time.perf_counter()
    first = Emoji()[0]["image"]
    assert time.perf_counter() - start < 2.0  # 0.4 s on an idle core
    first.zero_()
    assert Emoji()[0]["image"].any()
    assert vtp_emoji.tiles("google") is vtp_emoji.tiles("google")


def test_order_and_fingerprint_are_pure() -> None:
    data = Emoji()
    assert list(data.order(0, 1)) == list(data.order(0, 1)) != list(data.order(0, 2))
    assert data.fingerprint() == Emoji().fingerprint() != Emoji(split="unseen_style").fingerprint()
