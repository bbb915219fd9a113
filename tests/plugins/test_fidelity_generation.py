"""The probe of generators on toys: what it asks for, what stands beside its numbers, what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vtp_core import weights
from vtp_core.components import schema_of
from vtp_core.errors import DataFault
from vtp_core.probes import LeftOut, run_probes
from vtp_fidelity import generation as module
from vtp_fidelity.conditions import conditions
from vtp_fidelity.generation import Generation
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

SPEC = Spec(size=(16, 16), patch=(8, 8), channels=2)


@pytest.fixture
def lite0() -> Path:
    try:
        return weights.path("lite0")
    except DataFault as fault:
        if weights.verify("lite0")["lite0"] == "missing":
            pytest.skip(str(fault).replace("\n", " "))
        raise


def noise(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Data:
    """Labels 0 0 0 0 1 0 0 0 0 1 ..., captions w0, w1, ...; every seventh sample is broken."""

    fields = frozenset({"image", "label", "text"})
    provides: frozenset[str] = frozenset()
    splits = ("train",)
    names: Mapping[str, Sequence[str]] = {"label": ["common", "rare"]}

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i % 7 == 6:
            raise OSError("broken")
        return {"label": int(i % 5 == 4), "text": f"w{i}"}

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return range(40)

    def fingerprint(self) -> str:
        return "0123456789abcdef"


class ToyBench:
    splits = ("train", "unseen")
    device = torch.device("cpu")

    def __init__(self, n: int = 40) -> None:
        self.x, self.data, self.reads = (noise(n, 0) * 255).round() / 255, Data(), 0

    def dataset(self, split: str) -> Any:
        return self.data

    def images(self, split: str) -> Iterator[Tensor]:
        self.reads += 1
        yield from self.x.split(16)

    def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for x in self.x.split(16):
            yield x, x * 0.9

    def features(self, split: str) -> dict[str, Any]:
        raise NotImplementedError


class ToyGenerator:
    """Noise a little darker than the real images; remembers what it was asked."""

    names: Sequence[str] = ("common", "rare")
    condition: str | None = "label"
    protocol = "euler 4 steps, weights ema"
    evaluations = 4

    def __init__(self, dark: float = 0.8) -> None:
        self.dark, self.asked = dark, []
        self.tokenizer = SimpleNamespace(spec=SPEC, decode=self.decode)

    def decode(self, z: Tensor, standardized: bool = False) -> Tensor:
        assert standardized
        assert z.shape[1:] == (2, 2, 2)
        return z.mean((1, 2, 3), keepdim=True).sigmoid().expand(-1, 3, 16, 16)

    def sample(
        self,
        n: int = 16,
        labels: Any = None,
        texts: Any = None,
        seed: int = 0,
        batch: int = 64,
        first: int = 0,
    ) -> Tensor:
        self.asked: list[dict[str, Any]]
        self.asked.append(
            {"n": n, "labels": labels, "texts": texts, "seed": seed, "batch": batch, "first": first}
        )
        return noise(first + n, seed + 1)[first:] * self.dark


def taken(probe: Any, generator: Any, bench: Any = None) -> tuple[dict[str, Reading], list[str]]:
    readings, left_out = run_probes(None, {"generation": probe}, bench or ToyBench(), generator)
    return {r.probe: r for r in readings}, left_out


def test_numbers_stand_beside_floor_reconstructions_and_noise(lite0: Path) -> None:
    generator = ToyGenerator()
    found, left_out = taken(Generation(SPEC, size=32, n=32, seed=3), generator)
    assert left_out == []
    assert list(found) == [
        "generation/fd_lite0",
        "generation/fd_lite0/floor",
        "generation/fd_lite0/reconstructions",
        "generation/fd_lite0/noise",
        "generation/kid_lite0",
        "generation/is_lite0",
        "generation/precision_lite0",
        "generation/recall_lite0",
    ]
    value = {name.removeprefix("generation/"): r.value for name, r in found.items()}
    assert value["fd_lite0/reconstructions"] < value["fd_lite0"] < value["fd_lite0/noise"]
    assert found["generation/fd_lite0"].n == 32
    assert found["generation/fd_lite0/floor"].n == 16
    assert generator.asked == [
        {"n": 32, "labels": [0, 1] * 16, "texts": None, "seed": 3, "batch": 64, "first": 0}
    ]
    again, _ = taken(Generation(SPEC, size=32, n=32, seed=3), ToyGenerator())
    assert again == found


def test_a_protocol_says_all_that_a_number_depends_on(lite0: Path) -> None:
    found, _ = taken(Generation(SPEC, n=32, metrics=("fd",), rounding="truncate"), ToyGenerator())
    assert found["generation/fd_lite0"].protocol == (
        "32 samples against 32 images of train, reference 0123456789ab | label balanced, 16 of each of 2 | "
        "euler 4 steps, weights ema | seed 0 | 16x16 px, uint8 truncate | "
        "EfficientNet-Lite0 block10 112-d at 96 px, torch-fidelity"
    )
    assert not any("fid" in (r.probe + r.protocol).lower().replace("fidelity", "") for r in found.values())


def test_a_worse_generator_is_further_away(lite0: Path) -> None:
    options: dict[str, Any] = {"n": 40, "size": 32, "metrics": ("fd", "kid"), "beside": ()}
    found = [taken(Generation(SPEC, **options), ToyGenerator(dark))[0] for dark in (1.0, 0.7, 0.3)]
    for name in ("generation/fd_lite0", "generation/kid_lite0"):
        values = [readings[name].value for readings in found]
        assert values[0] < values[1] < values[2]


def test_fewer_real_images_make_fewer_samples_with_a_note(lite0: Path) -> None:
    generator = ToyGenerator()
    found, left_out = taken(
        Generation(SPEC, size=32, n=500, metrics=("fd",), beside=()), generator, ToyBench(24)
    )
    assert found["generation/fd_lite0"].n == generator.asked[0]["n"] == 24
    assert left_out == ["probes.generation: 24 samples, since train has no more images"]


def test_real_images_are_read_once_a_run(lite0: Path) -> None:
    probe, bench = Generation(SPEC, size=32, n=32, metrics=("fd",), beside=()), ToyBench()
    first, second = (taken(probe, ToyGenerator(), bench)[0] for _ in range(2))
    assert first == second
    assert bench.reads == 1


def test_chunks_of_samples_are_those_of_one_call(lite0: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"n": 40, "size": 32, "seed": 5, "metrics": ("fd",), "beside": ()}
    whole, _ = taken(Generation(SPEC, **options), ToyGenerator())
    monkeypatch.setattr(module, "CHUNK", 16)
    generator = ToyGenerator()
    parts, _ = taken(Generation(SPEC, **options), generator)
    assert [(call["n"], call["first"], call["seed"]) for call in generator.asked] == [
        (16, 0, 5),
        (16, 16, 5),
        (8, 32, 5),
    ]
    assert [label for call in generator.asked for label in call["labels"]] == [0, 1] * 20
    assert parts["generation/fd_lite0"].value == pytest.approx(whole["generation/fd_lite0"].value, rel=1e-5)


def test_a_tokenizer_without_statistics_leaves_out_the_noise_alone(lite0: Path) -> None:
    def none_yet(z: Tensor, standardized: bool = False) -> Tensor:
        raise DataFault("the tokenizer has no latent statistics yet")

    generator = ToyGenerator()
    generator.tokenizer.decode = none_yet
    found, left_out = taken(Generation(SPEC, size=32, n=16, metrics=("fd",)), generator)
    assert "generation/fd_lite0/noise" not in found
    assert len(found) == 3
    assert left_out == ["probes.generation: noise left out: the tokenizer has no latent statistics yet"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_samples_leave_it_out_with_one_line(lite0: Path, broken: float) -> None:
    found, left_out = taken(Generation(SPEC, size=32, n=32), ToyGenerator(broken))
    assert found == {}
    assert left_out == ["probes.generation left out: some pixels are not finite"]


def test_too_few_samples_for_one_metric_leave_that_one_out(lite0: Path) -> None:
    found, left_out = taken(Generation(SPEC, size=32, n=8, metrics=("fd", "is"), beside=()), ToyGenerator())
    assert list(found) == ["generation/fd_lite0"]
    assert left_out == ["probes.generation: is left out: 8 samples are too few; this metric needs 10 a side"]


def test_a_stack_without_generator_leaves_it_out() -> None:
    found, left_out = taken(Generation(SPEC), None)
    assert found == {}
    assert left_out == ["probes.generation left out: it measures a generator, and the stack has none"]


def test_missing_weights_leave_it_out_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    assert taken(Generation(SPEC), ToyGenerator())[1][0].endswith("vtp weights import lite0")
    lines = taken(Generation(SPEC, features="inception"), ToyGenerator())[1]
    assert "no package" not in lines[0]
    assert "vtp weights import inception --from" in lines[0]


def test_labels_are_balanced_random_or_the_datas() -> None:
    toy, data = ToyGenerator(), Data()
    odd = conditions(toy, data, "train", 5, None, 0)
    assert (odd.words, odd.labels) == ("label balanced, 2 or 3 of each of 2", [0, 1, 0, 1, 0])
    random = conditions(toy, data, "train", 400, "random", 0).labels
    assert random == conditions(toy, data, "train", 400, "random", 0).labels
    assert random != conditions(toy, data, "train", 400, "random", 1).labels
    assert random is not None
    assert 150 < sum(random) < 250
    own = conditions(toy, data, "train", 70, "data", 0)  # more than the 35 that can be read: they come again
    assert own.labels is not None
    assert own.labels[:35] == own.labels[35:]
    assert sum(own.labels[:35]) == sum(data[i]["label"] for i in range(40) if i % 7 != 6)


def test_captions_and_nothing_are_conditions_too() -> None:
    toy, data = ToyGenerator(), Data()
    toy.condition, toy.names = "text", ()
    found = conditions(toy, data, "train", 6, None, 0)
    assert found.labels is None
    assert found.texts is not None
    assert len(set(found.texts)) == 6
    assert found.part(2, 4) == {"labels": None, "texts": found.texts[2:4]}
    with pytest.raises(LeftOut, match="takes text, labels=data"):
        conditions(toy, data, "train", 6, "balanced", 0)
    data.fields = frozenset({"image"})  # type: ignore[misc]
    with pytest.raises(LeftOut, match="no text"):
        conditions(toy, data, "train", 6, None, 0)
    toy.condition = None
    assert conditions(toy, data, "train", 6, None, 0).part(0, 6) == {"labels": None, "texts": None}


def test_its_options_are_checked_before_it_is_built() -> None:
    assert set(schema_of(Generation)[0].model_fields) == {
        "n", "split", "labels", "features", "layer", "size", "seed", "rounding", "metrics", "beside", "batch_size",
    }  # fmt: skip
    with pytest.raises(ValueError, match="measures images"):
        Generation(Spec(modality="audio", size=(16,)))
    with pytest.raises(ValueError, match="layer is lite0's"):
        Generation(SPEC, features="inception", layer="pool")
