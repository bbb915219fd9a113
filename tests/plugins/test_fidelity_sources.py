"""Images from memory, folders and ADM's npz; what compares and what is refused; the command line."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vtp_core import weights
from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_fidelity import measure, measuring, save_npz
from vtp_fidelity.__main__ import main
from vtp_fidelity.networks import InceptionNetwork
from vtp_fidelity.npz import Npz
from vtp_fidelity.sources import Folder, InMemory, opened


@pytest.fixture
def lite0() -> Path:
    try:
        return weights.path("lite0")
    except DataFault as fault:
        if weights.verify("lite0")["lite0"] == "missing":
            pytest.skip(str(fault).replace("\n", " "))
        raise


def pictures(n: int, side: int = 16, seed: int = 0, top: int = 256) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (n, 3, side, side), generator=draw, dtype=torch.uint8)


def written(folder: Path, images: Tensor) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


def rows(source: Any, batch: int = 5) -> Tensor:
    return torch.cat(list(source.batches(batch)))


def test_what_is_written_in_adms_layout_reads_back_and_numpy_reads_it(tmp_path: Path) -> None:
    images, labels = pictures(12), torch.arange(12) % 3
    path = save_npz(tmp_path / "samples.npz", images.float() / 255, labels)
    with np.load(path) as file:
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape == (12, 16, 16, 3)
        assert np.array_equal(file["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert file["arr_1"].tolist() == labels.tolist()
    source = opened(path)
    assert isinstance(source, Npz)
    assert (len(source), source.size) == (12, (16, 16))
    assert source.labels is not None
    assert torch.equal(source.labels, labels)
    assert torch.equal(rows(source), images)
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_a_compressed_npz_of_others_reads_the_same(tmp_path: Path) -> None:
    images = pictures(7)
    np.savez_compressed(tmp_path / "a.npz", images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(rows(Npz(tmp_path / "a.npz")), images)


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros(3)},
        {"arr_0": np.zeros((2, 4, 4, 3), np.float32)},
        {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
        {"arr_0": np.array([{}], dtype=object)},
    ],
)
def test_other_layouts_and_pickles_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataFault, match=r"a\.npz"):
        Npz(tmp_path / "a.npz")


def test_a_damaged_or_torn_npz_is_an_error_and_no_number(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "a.npz", pictures(8))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataFault, match="broken"):
        rows(Npz(path))
    path.write_bytes(data[:2000])
    with pytest.raises(DataFault, match="not an npz"):
        Npz(path)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
        file.writestr("arr_0.npy", b"junk")
    with pytest.raises(DataFault, match="not an npz"):
        Npz(tmp_path / "b.npz")


def test_a_npz_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageFault):
        save_npz(tmp_path / "nowhere" / "a.npz", pictures(2))
    with pytest.raises(ValueError, match="labels"):
        save_npz(tmp_path / "a.npz", pictures(2), torch.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_reads_in_the_order_of_its_paths_and_crops_on_request(tmp_path: Path) -> None:
    images = pictures(6)
    folder = written(tmp_path / "a", images)
    assert torch.equal(rows(Folder(folder)), images)
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(folder / "zzz.png")
    with pytest.raises(StackFault, match="--size N --crop adm"):
        rows(Folder(folder))
    cropped = rows(Folder(folder, 16))
    assert torch.equal(cropped[:6], images)
    assert (cropped[6] == 90).all()
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataFault, match=r"broken\.png"):
        rows(Folder(folder, 16))


def test_sources_of_the_same_images_have_one_identity_and_others_another(tmp_path: Path) -> None:
    a, b = pictures(4), pictures(4, seed=1)
    assert InMemory(a).identity == InMemory(a.clone()).identity != InMemory(b).identity
    one, two = (Npz(save_npz(tmp_path / f"{i}.npz", x)) for i, x in enumerate((a, b)))
    again = Npz(save_npz(tmp_path / "again.npz", a))
    assert one.identity == again.identity != two.identity


def test_nothing_readable_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="neither a folder"):
        opened(tmp_path / "absent")
    with pytest.raises(DataFault, match="holds no pictures"):
        opened(tmp_path)


def test_all_sources_give_the_same_numbers_under_names_that_say_lite0(tmp_path: Path, lite0: Path) -> None:
    a, b = pictures(16), pictures(16, seed=1, top=200)
    found, notes = measure(a, b)
    assert notes == []
    names = ["fd_lite0", "kid_lite0", "is_lite0", "precision_lite0", "recall_lite0"]
    assert [r.probe for r in found] == names
    assert all(np.isfinite(r.value) for r in found)
    from_disk, _ = measure(written(tmp_path / "a", a), save_npz(tmp_path / "b.npz", b))
    assert [r.value for r in from_disk] == [r.value for r in found]
    same, _ = measure(a, a, metrics=["fd", "pr"])
    assert [r.value for r in same] == [pytest.approx(0, abs=1e-3), 1, 1]


def test_protocols_tell_numbers_reference_labels_and_network(tmp_path: Path, lite0: Path) -> None:
    a = save_npz(tmp_path / "a.npz", pictures(16), torch.arange(16) % 4)
    found, notes = measure(a, pictures(12), metrics=["fd", "is"])
    assert found[0].protocol == (
        f"16 samples against 12 of reference {InMemory(pictures(12)).identity} | 4 of each of 4 labels | "
        "16x16 px uint8 | EfficientNet-Lite0 block10 112-d at 96 px, torch-fidelity"
    )
    assert "against" not in found[1].protocol
    assert len(notes) == 1
    assert "16 samples against 12" in notes[0]


def test_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StackFault, match="samples are 16x16, the reference is 24x24"):
        measure(pictures(4), pictures(4, side=24))


def test_statistics_are_for_inception_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(StackFault, match="--features inception"):
        measure(pictures(4), tmp_path / "reference.npz")
    with pytest.raises(StackFault, match="statistics alone"):
        measure(tmp_path / "reference.npz", pictures(4))


def test_inception_without_its_weights_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTP_HOME", str(tmp_path))
    with pytest.raises(DataFault, match=r"weights-inception-2015-12-05-6726825d\.pth") as caught:
        measure(pictures(4), pictures(4), features="inception")
    assert str(caught.value).endswith(
        "vtp weights import inception --from weights-inception-2015-12-05-6726825d.pth"
    )


def test_inceptions_weights_are_read_as_tensors_into_torch_fidelitys_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = theirs.FeatureExtractorInceptionV3
    with monkeypatch.context() as at_random:  # weights of the right shapes, drawn at random
        at_random.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        at_random.setattr(network, "load_state_dict", lambda *_: None)
        state = network("any", ["2048"], verbose=False).state_dict()
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(weights, "path", lambda _: tmp_path / "inception.pth")
    ours = InceptionNetwork()
    pool, logits = ours(pictures(1), logits=True)
    assert logits is not None
    assert (pool.shape, logits.shape) == ((1, 2048), (1, 1008))
    torch.testing.assert_close(logits, pool @ state["fc.weight"].T)  # no bias
    assert not any(p.requires_grad for p in ours.network.parameters())


class Means:
    """Channel means under Inception's names."""

    names = InceptionNetwork.names
    described, scorer = "a toy", "a toy"

    def __call__(self, images: Tensor, logits: bool = False) -> tuple[Tensor, Tensor | None]:
        found = images.float().mean((2, 3))
        return found, found if logits else None


def test_inceptions_numbers_are_fid_and_an_npz_of_statistics_is_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "network", lambda *_: Means())
    samples = pictures(30)
    found, _ = measure(samples, pictures(30, seed=1), features="inception")
    assert [r.probe for r in found] == ["fid", "kid", "inception_score", "precision", "recall"]
    points = Means()(samples)[0].double()
    mu, sigma = points.mean(0).numpy(), torch.cov(points.T).numpy()
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    found, notes = measure(samples, tmp_path / "statistics.npz", features="inception")
    assert [r.probe for r in found] == ["fid", "inception_score"]
    assert found[0].value < 1e-3
    assert "30 samples against the statistics of reference" in found[0].protocol
    assert "2048 dimensions" in notes[0]
    images = pictures(20, seed=2).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", images, mu=mu, sigma=sigma)  # as ADM's references are
    found, notes = measure(samples, tmp_path / "adm.npz", features="inception", metrics=["fd", "pr"])
    assert found[0].value < 1e-3
    assert "against 20 of reference" in found[1].protocol
    assert "30 samples against 20" in notes[0]
    np.savez(tmp_path / "other.npz", mu=np.zeros(8), sigma=np.eye(8))
    with pytest.raises(DataFault, match="8 dimensions"):
        measure(samples, tmp_path / "other.npz", features="inception", metrics=["fd"])


def test_the_command_prints_rows_and_ends_faults_with_their_codes(
    tmp_path: Path, lite0: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(save_npz(tmp_path / f"{i}.npz", pictures(12, seed=i))) for i in range(2))
    with pytest.raises(SystemExit) as end:
        main([a, b, "--metrics", "fd,pr", "--json"])
    assert end.value.code == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["probe"] for row in found] == ["fd_lite0", "precision_lite0", "recall_lite0"]
    other = str(save_npz(tmp_path / "other.npz", pictures(4, side=24)))
    for arguments, code in (
        ([a, other], 2),
        ([a, a, "--metrics", "fdd"], 2),
        ([a, str(tmp_path / "absent")], 4),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == code
        assert capsys.readouterr().err.startswith("vtp_fidelity: ")
