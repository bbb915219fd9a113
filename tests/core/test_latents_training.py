"""Training from latents on disk: no encoder, one flip for all fields of a sample, and posteriors drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rig import built, registry, seen_by
from torch import Tensor, nn
from toys import Teacher, Whole

from vtp_core import Tokenizer
from vtp_core.data.loader import Loader
from vtp_core.data.views import Centre
from vtp_core.engine import Engine
from vtp_core.errors import DataFault, StackFault
from vtp_core.fields import check_fields
from vtp_core.forwards import Inputs
from vtp_core.latents import manifest, shards
from vtp_core.latents.dataset import Latents
from vtp_core.latents.encoding import Encoding, TeacherOutput
from vtp_core.latents.manifest import Manifest
from vtp_core.stack import check_stack
from vtp_core.statistics import digest, hexed
from vtp_plugins.spec import Spec

SAMPLES = 24
SPEC = Spec(size=(8, 8), patch=(4, 4), channels=4)
CONFIG: dict[str, Any] = {
    "modality": "image",
    "encoder": {"use": "patches"},
    "bottleneck": {"use": "linear", "channels": 4},
    "decoder": {"use": "unpatch"},
    "tokenizer": {"frozen": ["encoder", "bottleneck", "decoder"]},
    "generator": {"use": "denoiser", "path": {"use": "straight"}, "condition": "label"},
    "teachers": {"judge": {"width": 5}},
    "objectives": {
        "drift": {}, "read": {"want": "patches", "source": "teacher:judge"}, "rebuild": {"rows": 0.5},
    },
    "train": {"steps": 20, "optim": {"lr": 0.01, "warmup": 0}},
}  # fmt: skip


class Gaussian(nn.Module):
    """A bottleneck with a posterior."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.channels, self.shift = 4, shift
        self.link = nn.Linear(6, 8)

    def forward(self, x: Tensor, clock: Any = None) -> dict[str, Any]:
        mean, log_variance = self.link(x).chunk(2, -1)
        return {"latent": mean + self.shift, "carried": mean, "posterior": (mean, log_variance)}


def model_of(objectives: dict[str, Any] | None = None) -> Any:
    config = {**CONFIG, **({"objectives": objectives} if objectives else {})}
    return built(check_stack("toy", config, registry()))


def store(folder: Path, encoding: Encoding, signals: Tensor) -> Path:
    """Two shards of a batch."""
    found = []
    for number, rows in enumerate(torch.arange(SAMPLES).split(16)):
        tensors = encoding(signals[rows], rows.tolist(), [None] * len(rows))
        shards.publish(folder / f"latents-{number:05d}.safetensors", {**tensors, "labels": rows % 3}, "x")
        found.append(shards.entry(folder / f"latents-{number:05d}.safetensors"))
    statistics = {"mean": torch.arange(4.0), "std": torch.full((4,), 2.0)}
    provides = {"latent": "latents"}
    if encoding.teacher is not None:
        provides["teacher:judge/patches"] = encoding.teacher.tensor
    fields = {"label": "labels", **({"image": "images"} if encoding.images else {})}
    protocol = {"tokenizer": hexed(digest(encoding.tokenizer.state_dict()))}
    page = Manifest(
        layout="vtp", protocol=protocol, shape=(4, 2, 2), tensors=(*tensors, "labels"), fields=fields,
        provides=provides, names={"label": ["a", "b", "c"]}, samples=SAMPLES, skipped=0,
        statistics=manifest.write_statistics(folder, "vtp", statistics), shards=tuple(found), run="x",
    )  # fmt: skip
    manifest.write(folder, page)
    return folder


def pixels() -> Tensor:
    return torch.randint(
        256, (SAMPLES, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = model_of()
    judge = TeacherOutput("judge", "patches", model.teachers["judge"])
    tokenizer = Tokenizer(model).eval().requires_grad_(False)
    return store(tmp_path, Encoding(tokenizer, images=True, teacher=judge), pixels())


def loader(dataset: Latents, engine: Engine, **keys: Any) -> Loader:
    rows = engine.layout.rows_by_view()
    views = {name: view for name, view in engine.model.views.items() if name in rows}
    return Loader(dataset, views, rows, batch_size=8, **keys)


def inputs(values: dict[str, Any], engine: Engine) -> Inputs:
    views = {k: v for k, v in values.items() if k in engine.model.views}
    return Inputs(views, {k: v for k, v in values.items() if k not in views})


def test_a_step_from_disk_runs_neither_encoder_nor_teacher(folder: Path) -> None:
    model = model_of()
    dataset = Latents(SPEC, path=str(folder))
    engine = Engine(model, model.stack.train, 8, provided=dataset.provides)
    model.statistics = dataset.statistics()
    check_fields(model, dataset)
    assert engine.layout.rows_by_view() == {"latent": 8, "label": 8, "teacher:judge/patches": 8, "image": 4}
    batch = next(iter(loader(dataset, engine)))
    called: list[Any] = []
    model.teachers["judge"].register_forward_pre_hook(lambda module, args: called.append(args))
    drift, read = seen_by(engine, "drift"), seen_by(engine, "read")
    row = engine.step(inputs(batch.values, engine))
    assert not called
    assert not model.encoder.calls
    assert {key for key in row if key.startswith("grad/")} == {"grad/generator"}

    ids = batch.ids
    images = pixels()[ids]
    straight = torch.stack([dataset[int(i)]["latent"] for i in ids])
    flipped = [not torch.equal(*pair) for pair in zip(batch.values["latent"], straight, strict=True)]
    assert 0 < sum(flipped) < 8
    images[flipped] = images[flipped].flip(-1)
    assert torch.equal(batch.values["image"][:, 0], images[:4])  # mirrored as the latent was
    shown = model.modality.to_display(model.modality.normalise(images))
    with torch.no_grad():
        expected = Tokenizer(model).encode(images.float() / 255)
        taught = model.teachers["judge"](shown, want=frozenset({"patches"}))["patches"]
    torch.testing.assert_close(batch.values["latent"], expected)
    torch.testing.assert_close(read[0]["x"]["patches"][0], taught)
    assert read[0]["x"].grid == (2, 2)
    z = (expected - torch.arange(4.0).view(1, 4, 1, 1)) / 2  # standardised by the engine
    noise = drift[0]["x"]["target"][0] + z
    assert noise.mean().abs() < 0.5
    assert 0.5 < noise.std() < 1.5


def test_flips_follow_from_seed_epoch_and_sample_alone(folder: Path) -> None:
    dataset = Latents(SPEC, path=str(folder))
    rows = {"latent": 8}

    def drawn(
        batch_size: int, world: int, workers: int = 0, seed: int = 0, epochs: int = 2
    ) -> dict[Any, Tensor]:
        found = {}
        for rank in range(world):
            steps = SAMPLES * epochs // batch_size
            local = dict.fromkeys(rows, batch_size // world)
            for batch in Loader(
                dataset, {}, local, batch_size=batch_size, seed=seed, rank=rank, world=world, workers=workers,
                stop=steps,
            ):  # fmt: skip
                for sample, z in zip(batch.ids.tolist(), batch.values["latent"], strict=True):
                    found[batch.step * batch_size // SAMPLES, sample] = z
        return found

    first = drawn(8, 1)
    assert len(first) == 2 * SAMPLES
    for other in (drawn(8, 2), drawn(12, 1), drawn(8, 1, workers=2)):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    turned = [not torch.equal(first[0, i], first[1, i]) for i in range(SAMPLES)]
    assert 0 < sum(turned) < SAMPLES  # the second epoch draws anew
    assert any(not torch.equal(first[key], value) for key, value in drawn(8, 1, seed=1).items())


def test_without_images_an_objective_that_reads_pixels_is_told(tmp_path: Path) -> None:
    model = model_of()
    folder = store(tmp_path, Encoding(Tokenizer(model).eval(), flip=False), pixels())
    dataset = Latents(SPEC, path=str(folder))
    with pytest.raises(DataFault, match=r"no 'image', which objectives\.read reads"):
        check_fields(model, dataset)
    check_fields(model_of({"drift": {}}), dataset)  # the generator alone needs none


def test_prepared_images_have_one_view(folder: Path) -> None:
    dataset = Latents(SPEC, path=str(folder))
    made = next(iter(Loader(dataset, {"a": Centre(8)}, {"a": 4}, batch_size=4))).values["a"]
    assert made.shape == (4, 1, 3, 8, 8)
    with pytest.raises(DataFault, match=r"views\.a wants 2 crops of 'image'"):
        Loader(dataset, {"a": Whole(crops=2)}, {"a": 4}, batch_size=4)


# ---- posteriors


def gaussian(shift: float = 0.0) -> Tokenizer:
    model = model_of({"drift": {}})
    torch.manual_seed(3)
    model.bottleneck = Gaussian(shift)
    return Tokenizer(model).eval().requires_grad_(False)


def moments(tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    x = tokenizer.modality.normalise(pixels())
    mean, log_variance = tokenizer.bottleneck(tokenizer.encoder(x)["patches"])["posterior"]
    std = (log_variance / 2).exp()
    return tuple(v.transpose(1, 2).unflatten(2, (2, 2)) for v in (mean, std))  # type: ignore[return-value]


def test_a_sample_is_one_draw_of_the_posterior() -> None:
    tokenizer = gaussian()
    encoding = Encoding(tokenizer, "sample")
    found = encoding(pixels(), range(SAMPLES), [])
    mean, std = moments(tokenizer)
    noise = (found["latents"] - mean) / std
    assert noise.mean().abs() < 0.2
    assert 0.8 < noise.std() < 1.2
    late = encoding(pixels()[16:], range(16, SAMPLES), [])  # whatever is encoded with it
    torch.testing.assert_close(late["latents"], found["latents"][16:])
    symmetric = encoding(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [0, 1], [])
    assert not torch.equal(symmetric["latents"], symmetric["latents_flip"])  # a draw of its own


def test_moments_are_drawn_anew_in_every_epoch(tmp_path: Path) -> None:
    tokenizer = gaussian()
    mean, std = moments(tokenizer)
    dataset = Latents(SPEC, path=str(store(tmp_path, Encoding(tokenizer, "moments"), pixels())))
    torch.testing.assert_close(dataset[5]["latent"], mean[5])
    assert "deviations" not in dataset[5]
    draws = torch.stack([dataset.draw(5, key)["latent"] for key in range(0, 800, 2)])
    torch.testing.assert_close(draws.mean(0), mean[5], atol=0.3 * float(std[5].max()), rtol=0)
    torch.testing.assert_close(draws.std(0), std[5], atol=0.15 * float(std[5].max()), rtol=0)
    assert torch.equal(draws[3], dataset.draw(5, 6)["latent"])


def test_a_posterior_that_a_later_link_changes_is_refused() -> None:
    with pytest.raises(StackFault, match="a later link of the bottleneck"):
        Encoding(gaussian(shift=1.0), "moments")(pixels(), range(SAMPLES), [])


def test_latents_that_are_not_finite_are_refused() -> None:
    tokenizer = gaussian()
    tokenizer.bottleneck.link.bias.data[0] = float("nan")
    with pytest.raises(DataFault, match="sample 7: its latents are not finite"):
        Encoding(tokenizer)(pixels()[:2], [7, 8], [])


def test_the_judge_is_named_as_the_stack_names_it() -> None:
    assert TeacherOutput("judge", "cls", Teacher(SPEC)).tensor == "teacher/judge/cls"
