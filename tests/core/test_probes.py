"""Probes against values by hand, on a toy tokenizer and a toy dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtp_core.components import schema_of
from vtp_core.errors import DataFault
from vtp_core.probes import LeftOut, run_probes
from vtp_core.probes.bench import Bench
from vtp_core.probes.knn import KNN, nearest_neighbours
from vtp_core.probes.linear import LinearProbe, fit
from vtp_core.probes.rank_me import RankMe, effective_rank
from vtp_core.probes.reconstruction import Reconstruction, psnr, ssim
from vtp_core.probes.zero_shot import ZeroShot
from vtp_plugins.protocols import Bench as BenchContract
from vtp_plugins.protocols import Dataset, Probe
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

SPEC = Spec(size=(16, 16), patch=(8, 8), width=3, channels=2)
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
WORDS = ["red", "green", "blue", "yellow", "cyan", "magenta"]


class Colours:
    """Plain colours as concepts, in a bright, a dim and a washed-out style; two classes."""

    fields = frozenset({"image", "text", "label", "concept", "style"})
    provides: frozenset[str] = frozenset()
    splits = ("train", "unseen_style")
    names: Mapping[str, Sequence[str]] = {
        "label": ["primary", "mixed"],
        "concept": WORDS,
        "style": ["bright", "dim", "washed"],
    }
    broken: frozenset[int] = frozenset()

    def __init__(self, split: str | None) -> None:
        styles = (2,) if split == "unseen_style" else (0, 1)
        self.rows = [(concept, style) for style in styles for concept in range(6)]
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        if index in self.broken:
            raise OSError("truncated")
        concept, style = self.rows[index]
        colour = torch.tensor(COLOURS[concept]) * (1.0, 0.5, 0.8)[style] + (0, 0, 30)[style]
        image = colour[:, None, None].expand(3, 16, 16).to(torch.uint8)
        return {
            "image": image,
            "text": WORDS[concept],
            "label": concept // 3,
            "concept": concept,
            "style": style,
        }

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return range(len(self))

    def fingerprint(self) -> str:
        return "colours"


class Toy:
    """Features are mean colours; the latent keeps two of three channels; decoding errs by a tenth."""

    spec, device, decoder = SPEC, torch.device("cpu"), "some"

    def __init__(self) -> None:
        self.passes = 0

    def features(self, images: Tensor) -> Any:
        self.passes += 1
        patches = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return SimpleNamespace(cls=patches.mean(1), patches=patches, grid=(2, 2))

    def bottleneck(self, patches: Tensor) -> dict[str, Tensor]:
        return {"latent": patches[..., :2]}

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, z: Tensor) -> Tensor:
        return torch.where(z > 0.5, z - 0.1, z + 0.1)

    def embed_image(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean((2, 3)), dim=1)

    def embed_text(self, texts: list[str]) -> Tensor:
        known = dict(zip(WORDS, COLOURS, strict=True)) | {"primary": (1, 1, 1), "mixed": (0, 1, 1)}
        return F.normalize(torch.tensor([known[text] for text in texts]).float(), dim=1)


def bench_of(tokenizer: Any = None, make: Any = Colours, **keys: Any) -> Bench:
    return Bench(tokenizer or Toy(), make, **keys)


def values(readings: list[Reading]) -> dict[tuple[str, str], float]:
    return {(reading.probe, reading.split): reading.value for reading in readings}


# The bench


def test_the_toys_and_the_bench_keep_the_contract() -> None:
    bench: BenchContract = bench_of()
    assert bench.splits == ("train", "unseen_style")
    assert isinstance(Colours("train"), Dataset)


def test_all_probes_share_one_read_and_one_encoding_pass() -> None:
    tokenizer = Toy()
    made: dict[str, Colours] = {}
    bench = bench_of(
        tokenizer, lambda split: made.setdefault(split or "train", Colours(split)), batch_size=64
    )
    probes: dict[str, Probe] = {
        "reconstruction": Reconstruction(SPEC, lpips=None),
        "zero_shot": ZeroShot(SPEC),
        "knn": KNN(SPEC),
        "linear": LinearProbe(SPEC),
        "rank_me": RankMe(SPEC),
    }
    readings, left_out = run_probes(tokenizer, probes, bench)
    assert left_out == []
    assert {reading.probe.partition("/")[0] for reading in readings} == set(probes)
    assert all(math.isfinite(reading.value) and reading.protocol for reading in readings)
    assert tokenizer.passes == 2  # one batch a split
    assert {split: dataset.reads for split, dataset in made.items()} == {"train": 12, "unseen_style": 6}


def test_batch_size_and_memory_change_no_number() -> None:
    probes: dict[str, Probe] = {
        "reconstruction": Reconstruction(SPEC, lpips=None),
        "zero_shot": ZeroShot(SPEC),
        "knn": KNN(SPEC),
    }
    runs = [
        values(run_probes(Toy(), probes, bench_of(**keys))[0])
        for keys in ({}, {"batch_size": 5}, {"batch_size": 4, "memory": 0}, {"memory": 2000})
    ]
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], abs=1e-6)


@pytest.mark.parametrize("cls", [Reconstruction, ZeroShot, KNN, LinearProbe, RankMe])
def test_options_can_be_checked_before_a_probe_is_built(cls: type) -> None:
    assert "splits" in schema_of(cls)[0].model_fields


def test_rows_of_features_images_and_fields_belong_together() -> None:
    bench = bench_of(batch_size=5)
    rows = bench.features("train")
    images = torch.cat(list(bench.images("train")))
    assert sorted(rows["concept"]) == sorted(2 * list(range(6)))
    assert rows["concept"] != [concept for concept, _ in Colours("train").rows]  # a fixed random order
    for image, cls, concept, style in zip(images, rows["cls"], rows["concept"], rows["style"], strict=True):
        expected = torch.tensor(COLOURS[concept]) * (1.0, 0.5)[style] / 255
        torch.testing.assert_close(image.mean((1, 2)), expected)
        torch.testing.assert_close(cls, expected)


def test_a_limit_takes_a_fixed_sample() -> None:
    first, again = (bench_of(limit=4).features("train") for _ in range(2))
    assert len(first["cls"]) == len(first["text"]) == 4
    assert first["concept"] == again["concept"]


def test_broken_samples_are_skipped_and_counted() -> None:
    class Broken(Colours):
        broken = frozenset({3, 7})

    bench = bench_of(make=Broken, batch_size=4, memory=0)
    assert len(bench.features("train")["cls"]) == len(bench.features("train")["text"]) == 10
    assert len(torch.cat(list(bench.images("train")))) == 10
    assert bench.skipped["train"] == 2


def test_nothing_readable_is_a_data_fault() -> None:
    class Broken(Colours):
        broken = frozenset(range(12))

    with pytest.raises(DataFault, match="could be read"):
        bench_of(make=Broken).features("train")


def test_a_waveform_gets_its_middle() -> None:
    class Waves(Colours):
        fields = frozenset({"audio"})

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"audio": torch.arange(10.0)[None] / 10}

    tokenizer = Toy()
    tokenizer.spec = Spec(modality="audio", signal_channels=1, size=(4,), patch=(2,))
    batch = next(bench_of(tokenizer, Waves).images("train"))
    assert batch.shape == (12, 1, 4)
    torch.testing.assert_close(batch[0, 0], torch.tensor([0.3, 0.4, 0.5, 0.6]))


# Leaving out


def test_a_probe_without_its_fields_is_left_out_with_one_line() -> None:
    class Bare(Colours):
        fields = frozenset({"image"})

    readings, left_out = run_probes(
        Toy(), {"z": ZeroShot(SPEC), "l": LinearProbe(SPEC), "r": RankMe(SPEC)}, bench_of(make=Bare)
    )
    assert {reading.probe for reading in readings} == {"rank_me/cls", "rank_me/patches", "rank_me/latent"}
    assert left_out == [
        "probes.z left out: the dataset has no text",
        "probes.l left out: the dataset has no label",
    ]


def test_a_tokenizer_without_text_leaves_zero_shot_out() -> None:
    class Blind(Toy):
        def embed_image(self, images: Tensor) -> Tensor:
            raise LookupError("pip install vtp-clip")

    readings, left_out = run_probes(Blind(), {"zero_shot": ZeroShot(SPEC)}, bench_of(Blind()))
    assert (readings, left_out) == ([], ["probes.zero_shot left out: pip install vtp-clip"])


def test_lpips_without_its_weights_is_left_out_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    readings, left_out = run_probes(Toy(), {"reconstruction": Reconstruction(SPEC)}, bench_of())
    assert {reading.probe for reading in readings} == {"reconstruction/psnr", "reconstruction/ssim"}
    assert len(left_out) == 1
    assert left_out[0].endswith("vtp weights import lpips-alex")


def test_a_tokenizer_without_decoder_leaves_reconstruction_out() -> None:
    tokenizer = Toy()
    tokenizer.decoder = None  # type: ignore[assignment]
    _, left_out = run_probes(tokenizer, {"r": Reconstruction(SPEC, lpips=None)}, bench_of(tokenizer))
    assert left_out == ["probes.r left out: the tokenizer has no decoder"]


def test_one_split_alone_leaves_the_linear_probe_out_and_the_neighbours_in() -> None:
    class One(Colours):
        splits = ("train",)  # type: ignore[assignment]

    readings, left_out = run_probes(Toy(), {"l": LinearProbe(SPEC), "k": KNN(SPEC)}, bench_of(make=One))
    assert left_out == ["probes.l left out: a linear probe needs a second split, the dataset has train alone"]
    assert {reading.probe.partition("@")[2] for reading in readings} == {"itself"}


def test_a_split_that_is_not_there_is_named() -> None:
    with pytest.raises(LeftOut, match="no split tset; it has train, unseen_style"):
        KNN(SPEC, splits=("tset",))(Toy(), bench_of())


# Numbers


def test_psnr_of_a_tenth_is_20_db() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x, x + 0.1).tolist() == pytest.approx([20, 20], abs=1e-5)
    assert psnr(x, x).tolist() == [100, 100]
    found = values(Reconstruction(SPEC, lpips=None)(Toy(), bench_of()))
    assert found["reconstruction/psnr", "train"] == pytest.approx(20, abs=1e-4)


def test_psnr_is_averaged_over_images_and_not_over_errors() -> None:
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([x[0] + 0.1, x[1] + 0.01])
    assert psnr(x, y).mean().item() == pytest.approx(30, abs=1e-4)


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    x, y = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(x, y).item() == pytest.approx(expected, abs=1e-4)
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert ssim(noise, 1 - noise).max() < -0.5


def test_ssim_is_the_formula_with_gaussian_moments_at_every_place() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(1, 1, 7, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    line = torch.exp(-((torch.arange(11.0, dtype=torch.float64) - 5) ** 2) / 4.5)
    window = torch.outer(line, line) / line.sum() ** 2
    found = []
    for top in range(7):
        for left in range(12):
            a, b = (
                F.pad(v, (5, 5, 5, 5), mode="reflect")[0, 0, top : top + 11, left : left + 11] for v in (x, y)
            )
            m, n = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - m) ** 2).sum(), (window * (b - n) ** 2).sum()
            both = (window * (a - m) * (b - n)).sum()
            found.append(
                (2 * m * n + 1e-4) * (2 * both + 9e-4) / (m**2 + n**2 + 1e-4) / (var_a + var_b + 9e-4)
            )
    assert ssim(x, y).item() == pytest.approx(torch.stack(found).mean().item(), abs=1e-10)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5, abs=1e-4)
    assert effective_rank(torch.ones(7, 1) @ torch.rand(1, 5)) == pytest.approx(1, abs=1e-4)
    shares = torch.tensor([0.5, 0.25, 0.25])
    expected = math.exp(-(shares * shares.log()).sum().item())
    assert effective_rank(shares.diag() * 8) == pytest.approx(expected, abs=1e-4)


def test_nearest_neighbours_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    assert nearest_neighbours(x, x).tolist() == [0, 1, 2, 3]
    assert nearest_neighbours(x, x, leave_one_out=True).tolist() == [1, 0, 3, 2]
    assert nearest_neighbours(x[:1], x[2:]).tolist() == [1]


def test_neighbours_are_counted_by_gallery() -> None:
    found = values(KNN(SPEC, pixels=2)(Toy(), bench_of()))
    # colours differ in direction only, so that a washed-out colour still lies next to its own
    assert found["knn/cls/concept@bright", "unseen_style"] == 1
    assert found["knn/cls/label@train", "unseen_style"] == 1
    assert found["knn/pixels2/concept@bright", "unseen_style"] == 1
    # red and green: blue is missing in the latent, so magenta looks red, cyan green and blue yellow
    assert found["knn/latent/concept@bright", "unseen_style"] < 1
    # every concept is there once, so none can find its like
    assert ("knn/cls/concept@itself", "unseen_style") not in found
    assert ("knn/cls/label@itself", "unseen_style") in found


def test_the_style_of_the_gallery_can_be_chosen() -> None:
    found = {
        reading.probe: reading for reading in KNN(SPEC, style="dim", features=("cls",))(Toy(), bench_of())
    }
    assert "6 images: train in style dim" in found["knn/cls/concept@dim"].protocol
    assert "12 images: all of train" in found["knn/cls/concept@train"].protocol


def test_zero_shot_by_hand() -> None:
    readings = ZeroShot(SPEC, top=(1, 2), classes=("label",))(Toy(), bench_of())
    found = values(readings)
    assert found["zero_shot/text_to_image_top1", "unseen_style"] == 1
    assert found["zero_shot/image_to_text_top1", "unseen_style"] == 1
    # the names are grey and cyan: cyan takes green and blue besides cyan, grey takes yellow and magenta
    assert found["zero_shot/label_by_name", "unseen_style"] == pytest.approx(2 / 6)
    assert "among 6 captions and 6 images" in readings[0].protocol
    assert "chance of top-1 16.67 %" in readings[0].protocol


def test_retrieval_counts_ranks_over_several_images_of_a_concept() -> None:
    class Swapped(Toy):
        def embed_text(self, texts: list[str]) -> Tensor:
            swap = {"red": "green", "green": "red"}
            return super().embed_text([swap.get(text, text) for text in texts])

    found = values(ZeroShot(SPEC, splits=("train",), top=(1, 5), classes=())(Swapped(), bench_of(Swapped())))
    assert found["zero_shot/text_to_image_top1", "train"] == pytest.approx(4 / 6)
    assert found["zero_shot/image_to_text_top1", "train"] == pytest.approx(8 / 12)


def test_embeddings_that_are_all_equal_find_nothing() -> None:
    class Collapsed(Toy):
        def embed_image(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 3)

        def embed_text(self, texts: list[str]) -> Tensor:
            return torch.ones(len(texts), 3)

    found = values(ZeroShot(SPEC, top=(1, 5), classes=())(Collapsed(), bench_of(Collapsed())))
    assert set(found.values()) == {0.0}


def test_samples_without_a_caption_are_no_queries() -> None:
    class Partial(Colours):
        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            return sample | ({"text": None} if sample["concept"] == 2 else {})

    readings = ZeroShot(SPEC)(Toy(), bench_of(make=Partial))
    assert {reading.n for reading in readings} == {5}


def test_the_linear_probe_equals_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    x = torch.randn(120, 6, generator=draw) + torch.eye(6)[y] * 2
    x = (x - x.mean(0)) / x.std(0, correction=0)
    ours = fit(x * 3 + 5, y, 4, penalty=0.01)  # any scale and shift
    theirs = linear_model.LogisticRegression(C=1 / (0.01 * 120), tol=1e-8, max_iter=1000).fit(x, y)
    torch.testing.assert_close(
        ours(x * 3 + 5).softmax(1), torch.tensor(theirs.predict_proba(x)).float(), atol=2e-4, rtol=0
    )


def test_the_linear_probe_is_fitted_on_train_and_asked_elsewhere() -> None:
    readings = LinearProbe(SPEC, features=("cls",), target="concept", penalty=1e-6)(Toy(), bench_of())
    assert [(r.probe, r.split, r.n) for r in readings] == [("linear/cls/concept", "unseen_style", 6)]
    again = LinearProbe(SPEC, features=("cls",), target="concept", penalty=1e-6)(Toy(), bench_of())
    assert readings == again
    assert "fitted on 12 of train" in readings[0].protocol


def test_lpips_tells_a_blurred_image_from_itself() -> None:
    from vtp_core import weights
    from vtp_core.probes.reconstruction import lpips_network

    try:
        weights.path("lpips-alex")
    except DataFault as fault:
        pytest.skip(str(fault).replace("\n", " "))
    network = lpips_network("alex")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blurred = [F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False) for side in (1, 3, 5, 9)]
    distances = torch.stack([network(x, y).mean() for y in blurred])
    assert distances[0] == 0
    assert (distances.diff() > 0).all()
    assert not any(p.requires_grad for p in network.parameters())
