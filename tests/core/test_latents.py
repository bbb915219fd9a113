"""Latents on disk: what is written, that a write goes on where it stopped, and what refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open
from small import run as command
from small import write_stack
from torch import Tensor

from vtp_core import Tokenizer, cli_generation, load_stack, train
from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.latents.dataset import Latents
from vtp_core.latents.writer import write_latents
from vtp_core.statistics import digest
from vtp_plugins.registry import Registry
from vtp_plugins.spec import Spec

SPEC = Spec(size=(32, 32), patch=(8, 8), channels=8)
PICTURES = 22
TOYS = Registry([Path(__file__).with_name("toy_objectives.py")])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pictures in two classes, with captions but for one."""
    folder = tmp_path_factory.mktemp("pictures")
    random = torch.Generator().manual_seed(0)
    for number in range(PICTURES):
        place = folder / ("cat" if number % 2 else "dog")
        place.mkdir(exist_ok=True)
        pixels = torch.randint(256, (6, 6, 3), generator=random, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((40, 36)).save(place / f"{number:02d}.png")
        if number:
            (place / f"{number:02d}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that was trained for two steps."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        "data.use=image_folder", f"data.root={pictures}", "data.holdout=0.0", "data.batch_size=16",
        "data.workers=0", "~objectives.dino", "~objectives.ibot", "~objectives.koleo", "train.steps=2",
        f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    return train(load_stack(write_stack(folder), overrides)).path


@pytest.fixture(scope="module")
def tokenizer(run: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(run)


@pytest.fixture(scope="module")
def written(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 8, 8 and 6 samples, with everything beside them."""
    out = tmp_path_factory.mktemp("written") / "deep" / "latents"
    write_latents(
        run, out, overrides=["teachers.judge.width=5"], images=True, teacher="judge", shard_size=8, registry=TOYS
    )  # fmt: skip
    return out


def signals(run: Path) -> tuple[Tensor, list[dict[str, Any]]]:
    """What is encoded, in order: (n, 3, H, W) uint8, and the raw samples."""
    from vtp_core.data.views import Centre
    from vtp_core.evaluation import dataset_factory

    dataset = dataset_factory(load_stack(run), SPEC)(None)
    samples = [dataset[i] for i in range(len(dataset))]
    return torch.cat([Centre(SPEC.size)(sample["image"]) for sample in samples]), samples


# ---- writing


def test_the_command_takes_every_option_of_the_writer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--no-flip", "--images", "--shard-size", "10", "--weights", "student", "--split", "train"]
    code, out, _ = command(capsys, "latents", str(run), "-o", str(tmp_path / "z"), *options)
    assert (code, out) == (0, f"latents {tmp_path / 'z' / 'manifest.json'}\n")
    found = json.loads((tmp_path / "z" / "manifest.json").read_text())
    assert [shard["samples"] for shard in found["shards"]] == [10, 10, 2]
    assert "latents_flip" not in found["tensors"] and "image" in found["fields"]
    given = set(inspect.signature(write_latents).parameters) - {"run", "device", "registry", "note"}
    assert given <= set(inspect.signature(cli_generation.latents).parameters)


def test_shards_hold_the_tokenizers_raw_latents_in_order(
    run: Path, written: Path, tokenizer: Tokenizer
) -> None:
    assert sorted(p.name for p in written.iterdir()) == [
        ".lock", "latents-00000.safetensors", "latents-00001.safetensors", "latents-00002.safetensors",
        "manifest.json", "statistics.safetensors",
    ]  # fmt: skip
    parts = [load_file(path) for path in sorted(written.glob("latents-*.safetensors"))]
    assert [len(part["labels"]) for part in parts] == [8, 8, 6]
    held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    images, samples = signals(run)
    for name, shown in (("latents", images), ("latents_flip", images.flip(-1))):
        torch.testing.assert_close(held[name], tokenizer.encode(shown.float() / 255), atol=1e-5, rtol=1e-5)
    assert held["latents"].shape == (PICTURES, 8, 4, 4)
    assert held["labels"].dtype == torch.int64
    assert held["labels"].tolist() == [sample["label"] for sample in samples]
    assert torch.equal(held["images"], images)
    texts = [sample["text"] for sample in samples]
    assert texts.count(None) == 1
    none = texts.index(None)
    assert not held["embeddings"][none].any()  # zero conditions on nothing
    embedded = tokenizer.embed_text([text or "" for text in texts])
    embedded[none] = 0
    torch.testing.assert_close(held["embeddings"], embedded)


def test_statistics_and_manifest_say_whose_they_are(run: Path, written: Path, tokenizer: Tokenizer) -> None:
    stored = load_file(written / "statistics.safetensors")
    for name in ("mean", "std", "count"):
        assert torch.equal(stored[name], tokenizer.statistics[name])
    assert torch.equal(stored["of"], digest(tokenizer.state_dict()))
    dataset = Latents(SPEC, path=str(written))
    z = torch.stack([dataset[i]["latent"] for i in range(len(dataset))])
    torch.testing.assert_close(z.mean((0, 2, 3)), stored["mean"])
    torch.testing.assert_close(z.transpose(0, 1).flatten(1).std(1), stored["std"])
    table = json.loads((written / "manifest.json").read_text())
    assert table["samples"] == PICTURES
    assert table["names"] == {"label": ["cat", "dog"]}
    assert table["protocol"]["split"] == "train"
    assert table["protocol"]["flip"] is True
    assert table["run"] == str(run)


def test_a_write_goes_on_where_it_was_interrupted(run: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def note(line: str) -> None:
        if "00001" in line:
            raise Killed

    whole, out = tmp_path / "whole", tmp_path / "out"
    write_latents(run, whole, shard_size=8)
    with pytest.raises(Killed):
        write_latents(run, out, shard_size=8, note=note)
    (out / ".tmp-latents-00002.safetensors-x").write_bytes(b"half")
    with pytest.raises(DataFault, match="has not finished"):
        Latents(SPEC, path=str(out))
    first = (out / "latents-00000.safetensors").stat()
    (out / "latents-00001.safetensors").write_bytes(b"cut off")
    lines: list[str] = []
    write_latents(run, out, shard_size=8, note=lines.append)
    assert any("1 of 3 shards are there already" in line for line in lines)
    assert (out / "latents-00000.safetensors").stat() == first
    assert (out / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    assert not list(out.glob(".tmp-*"))
    again: list[str] = []
    write_latents(run, out, shard_size=8, note=again.append)
    assert again == [f"{out} is finished: {PICTURES} latents"]


def test_a_folder_of_other_latents_is_left_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_latents(run, out)
    with pytest.raises(StackFault, match=r"latents of another flip; give another -o"):
        write_latents(run, out, flip=False)
    (out / "manifest.json").unlink()
    with pytest.raises(StackFault, match="unfinished write with other settings"):
        write_latents(run, out, flip=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFault, match="-o names another place"):
        write_latents(run, tmp_path / "file")


def test_a_changed_shard_is_written_again(run: Path, tmp_path: Path) -> None:
    write_latents(run, tmp_path, shard_size=8)
    before = (tmp_path / "manifest.json").read_text()
    path = tmp_path / "latents-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # of the same size
    (tmp_path / "latents-00002.safetensors").unlink()
    write_latents(run, tmp_path, shard_size=8)
    assert (tmp_path / "manifest.json").read_text() == before
    Latents(SPEC, path=str(tmp_path), verify="full")


def test_lightningdit_reads_its_layout(run: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The way its own dataset does: every safetensors file is a shard, statistics broadcast over (1, C, h, w)."""
    write_latents(run, tmp_path, layout="lightningdit", shard_size=8)
    labels = []
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as file:
            assert sorted(file.keys()) == ["labels", "latents", "latents_flip"]
            count = file.get_slice("labels").get_shape()[0]
            for row in range(count):
                z = file.get_slice("latents_flip")[row : row + 1]
                labels += file.get_slice("labels")[row : row + 1].tolist()
                assert (z.shape, z.dtype) == ((1, 8, 4, 4), torch.float32)
    assert len(labels) == PICTURES
    assert set(labels) == {0, 1}
    stats = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 8, 1, 1)
    ours = Latents(SPEC, path=str(tmp_path))
    assert torch.equal(ours.statistics()["mean"], tokenizer.statistics["mean"])
    assert "text" not in ours.fields
    with pytest.raises(StackFault, match="--layout vtp"):
        write_latents(run, tmp_path / "b", layout="lightningdit", images=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "other.safetensors").write_bytes(b"")
    with pytest.raises(StackFault, match=r"other\.safetensors, which LightningDiT would read"):
        write_latents(run, tmp_path / "c", layout="lightningdit")


def test_broken_samples_are_left_out_and_told(run: Path, pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for source in pictures.rglob("*.png"):
        target = root / source.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (root / "cat" / "07.png").write_bytes(b"no picture")
    lines: list[str] = []
    out = tmp_path / "out"
    overrides = [f"data.root={root}", "data.workers=2"]
    write_latents(run, out, overrides=overrides, shard_size=1, flip=False, note=lines.append)
    assert f"data: left out 1 of {PICTURES} samples: cat/07.png: not a picture" in lines
    dataset = Latents(SPEC, path=str(out))
    assert len(dataset) == PICTURES - 1
    assert not dataset.flip
    assert dataset.fields == {"latent", "label", "name"}
    for source in root.rglob("*.png"):
        source.write_bytes(b"no picture")
    with pytest.raises(DataFault, match="none of 22 samples can be read: cat/"):
        write_latents(run, tmp_path / "none", overrides=overrides)


def test_what_does_not_fit_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StackFault, match="only data"):
        write_latents(run, tmp_path, overrides=["train.steps=3"])
    with pytest.raises(StackFault, match="no split 'test'"):
        write_latents(run, tmp_path, split="test")
    with pytest.raises(StackFault, match="no 'judge' under 'teachers'"):
        write_latents(run, tmp_path, teacher="judge")
    with pytest.raises(StackFault, match=r"teachers\.judge gives no 'hidden:3'; it gives cls, patches"):
        write_latents(
            run, tmp_path, overrides=["teachers.judge.width=3"], teacher="judge/hidden:3", registry=TOYS
        )
    with pytest.raises(StackFault, match="bottleneck has none; --posterior mean"):
        write_latents(run, tmp_path, posterior="sample")
    with pytest.raises(DataFault, match="no run directory"):
        write_latents(tmp_path, tmp_path / "out")
    with pytest.raises(StackFault, match="no EMA teacher"):
        write_latents(run, tmp_path, weights="ema")


# ---- reading


def test_a_broken_shard_names_itself_and_the_remedy(run: Path, tmp_path: Path) -> None:
    write_latents(run, tmp_path, shard_size=8)
    path = tmp_path / "latents-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(DataFault, match=r"latents-00001\.safetensors has \d+ bytes, .*vtp latents .* -o"):
        Latents(SPEC, path=str(tmp_path))
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Latents(SPEC, path=str(tmp_path), verify="size")
    for verify in ("full", "auto"):  # a small folder is hashed without being asked
        with pytest.raises(DataFault, match="another sha256"):
            Latents(SPEC, path=str(tmp_path), verify=verify)
    path.write_bytes(b"\xff" * len(data))
    dataset = Latents(SPEC, path=str(tmp_path), verify="size")
    with pytest.raises(DataFault, match=r"latents-00001\.safetensors cannot be read"):
        dataset[9]
    path.unlink()
    with pytest.raises(DataFault, match=r"latents-00001\.safetensors is missing"):
        Latents(SPEC, path=str(tmp_path))


def test_a_folder_without_latents_says_how_to_write_them(tmp_path: Path, written: Path) -> None:
    with pytest.raises(DataFault, match=r"no manifest\.json; write them with: vtp latents"):
        Latents(SPEC, path=str(tmp_path / "absent"))
    (tmp_path / "manifest.json").write_text('{"format": "vtp shards 1"}')
    with pytest.raises(DataFault, match="cannot be read"):
        Latents(SPEC, path=str(tmp_path))
    (tmp_path / "manifest.json").write_bytes((written / "manifest.json").read_bytes())
    for shard in written.glob("latents-*"):
        (tmp_path / shard.name).symlink_to(shard)
    with pytest.raises(DataFault, match=r"statistics\.safetensors cannot be used"):
        Latents(SPEC, path=str(tmp_path))


def test_latents_of_another_shape_are_refused(written: Path) -> None:
    for spec in (
        Spec(size=(32, 32), patch=(8, 8), channels=4),
        Spec(size=(64, 64), patch=(8, 8), channels=8),
    ):
        with pytest.raises(DataFault, match=r"8 channels on 4 x 4, the stack's tokenizer makes"):
            Latents(spec, path=str(written))
    with pytest.raises(ValueError, match=r"no split 'val'.*data\.val"):
        Latents(SPEC, "val", path=str(written))


def test_a_second_split_is_a_second_folder(run: Path, written: Path, tmp_path: Path) -> None:
    write_latents(run, tmp_path)
    dataset = Latents(SPEC, "val", path=str(written), val=str(tmp_path))
    assert dataset.splits == ("train", "val")
    assert dataset.fingerprint() != Latents(SPEC, path=str(written)).fingerprint()
    assert torch.equal(dataset.tokenizer_digest, Latents(SPEC, path=str(written)).tokenizer_digest)


def test_a_draw_mirrors_every_field_of_a_sample(written: Path) -> None:
    dataset = Latents(SPEC, path=str(written))
    assert dataset.provides == {"latent", "teacher:judge/patches"}
    assert dataset.embedding_width == 16
    part = load_file(written / "latents-00001.safetensors")
    seen = set()
    for draw in range(8):
        sample = dataset.draw(9, draw)
        mirrored = torch.equal(sample["latent"], part["latents_flip"][1])
        end = "_flip" if mirrored else ""
        seen.add(mirrored)
        assert torch.equal(sample["latent"], part[f"latents{end}"][1])
        assert torch.equal(sample["teacher:judge/patches"], part[f"teacher/judge/patches{end}"][1])
        assert torch.equal(sample["image"], part["images"][1].flip(-1) if mirrored else part["images"][1])
        assert sample["label"] == dataset[9]["label"]
        assert torch.equal(sample["text"], dataset[9]["text"])
    assert seen == {True, False}
    still = Latents(SPEC, path=str(written), flip=False)
    assert all(torch.equal(still.draw(9, draw)["latent"], dataset[9]["latent"]) for draw in range(8))
