"""FD-lite0: the distance against closed forms, the network against what it must know, the probe on toys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtp_core import weights
from vtp_core.components import schema_of
from vtp_core.errors import DataFault
from vtp_core.nn.lite0 import load
from vtp_core.probes import run_probes
from vtp_fidelity import FDLite0, Lite0, frechet_distance
from vtp_plugins.spec import Spec


@pytest.fixture
def lite0() -> Path:
    try:
        return weights.path("lite0")
    except DataFault as fault:
        if weights.verify("lite0")["lite0"] == "missing":
            pytest.skip(str(fault).replace("\n", " "))
        raise


class ToyBench:
    """Two splits of noise images that come back ``shift`` brighter."""

    splits = ("train", "unseen")
    device = torch.device("cpu")

    def __init__(self, n: int = 48, shift: float = 0.0) -> None:
        self.x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        self.shift = shift

    def dataset(self, split: str) -> Any:
        return type("Bare", (), {"fields": frozenset({"image"})})

    def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for x in self.x.split(20):
            yield x, (x + self.shift).clamp(0, 1)

    def images(self, split: str) -> Iterator[Tensor]:
        raise NotImplementedError

    def features(self, split: str) -> dict[str, Any]:
        raise NotImplementedError


def test_the_distance_of_a_shift_is_its_square() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + 0.5) == pytest.approx(6 * 0.25, rel=1e-6)
    assert frechet_distance(x, x * 3) == pytest.approx(frechet_distance(x * 3, x), rel=1e-9)


def test_the_distance_of_scaled_gaussians_is_the_difference_of_their_roots() -> None:
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x - x.mean(0)
    trace = float(np.trace(np.cov(x.numpy(), rowvar=False)))
    assert frechet_distance(x, 3 * x) == pytest.approx((3 - 1) ** 2 * trace, rel=1e-6)


def test_fewer_samples_than_dimensions_stay_finite() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(30, 112, generator=draw), torch.randn(30, 112, generator=draw) + 1
    assert 0 < frechet_distance(a, b) < 1e4


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_and_no_number(broken: float) -> None:
    x = torch.randn(10, 3)
    y = x.clone()
    y[3, 1] = broken
    with pytest.raises(ArithmeticError, match="not finite"):
        frechet_distance(x, y)


def test_a_faulty_blas_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(3))
    right = np.linalg.eigvals
    monkeypatch.setattr(np.linalg, "eigvals", lambda m: right(m) * 0.5)
    with pytest.raises(ArithmeticError, match="disagree"):
        frechet_distance(x, x + 1)


def test_missing_weights_leave_the_probe_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    readings, left_out = run_probes(None, {"fd": FDLite0(Spec(size=(16, 16)))}, ToyBench())
    assert readings == []
    assert left_out[0].endswith("vtp weights import lite0")


def test_its_options_can_be_checked_before_it_is_built() -> None:
    assert set(schema_of(FDLite0)[0].model_fields) == {"splits", "limit", "layer", "size", "seed"}


def test_another_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="measures images"):
        FDLite0(Spec(modality="audio", size=(16,)))


def test_layers_have_their_widths_and_tensorflows_padding() -> None:
    network = Lite0().eval()
    for layer, width in Lite0.widths.items():
        assert network(torch.rand(2, 3, 64, 48), layer).shape == (2, width)
    stem = network._conv_stem
    x = torch.rand(1, 3, 8, 8)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))  # the odd pixel goes right and down
    expected = torch.nn.functional.conv2d(padded, stem.weight, stride=2)
    torch.testing.assert_close(stem(x), expected)


def test_the_weights_fit_and_the_network_is_frozen(lite0: Path) -> None:
    network = load(lite0)
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training


def test_the_network_knows_a_flower(lite0: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn, whose sample image is used")
    flower = torch.from_numpy(datasets.load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(flower.float() / 255, (224, 224), mode="bilinear", antialias=True)
    assert load(lite0)(x, "logits").argmax().item() == 985  # daisy, the one flower of its kind in ImageNet


def test_a_distance_grows_with_the_damage_and_its_floor_stands_beside_it(lite0: Path) -> None:
    spec = Spec(size=(16, 16))
    found = [FDLite0(spec, limit=40)(None, ToyBench(shift=shift)) for shift in (0.0, 0.1, 0.3)]
    distances = [readings[0].value for readings in found]
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[0] < distances[1] < distances[2]
    distance, floor = found[1]
    assert (distance.probe, distance.split, distance.n) == ("fd_lite0", "unseen", 40)
    assert (floor.probe, floor.n) == ("fd_lite0/floor", 20)
    assert floor.value > 0
    assert f"floor {floor.value:.1f}" in distance.protocol
    assert "block10 112-d at 96 px" in distance.protocol
    assert not any("fid" in (r.probe + r.protocol).lower().replace("fidelity", "") for r in found[1])


def test_broken_reconstructions_leave_the_probe_out_with_one_line(lite0: Path) -> None:
    class One(ToyBench):
        def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
            yield self.x[:1], self.x[:1]

    readings, left_out = run_probes(None, {"fd": FDLite0(Spec(size=(16, 16)))}, One())
    assert readings == []
    assert left_out == [
        "probes.fd left out: split unseen: a Fréchet distance needs two samples a side, not 0 and 0"
    ]


def test_torch_fidelity_gives_the_same_number_by_our_extractors_name(lite0: Path) -> None:
    import torch_fidelity

    from vtp_fidelity.extractor import NAME, features, register

    register()
    register()  # once is enough, twice is no error
    draw = torch.Generator().manual_seed(4)
    a, b = (torch.randint(0, top, (24, 3, 32, 32), generator=draw, dtype=torch.uint8) for top in (256, 200))

    class Images(torch.utils.data.Dataset[Tensor]):
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> Tensor:
            return self.x[i]

    theirs = torch_fidelity.calculate_metrics(
        input1=Images(a),
        input2=Images(b),
        fid=True,
        feature_extractor=NAME,
        feature_extractor_weights_path=str(lite0),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        datasets_download=False,
    )["frechet_inception_distance"]
    network = load(lite0)
    with torch.no_grad():
        ours = frechet_distance(*(features(network, x, "block10", 96) for x in (a, b)))
    assert ours == pytest.approx(theirs, rel=1e-3)
