"""Published layouts through `vtp convert`: each family loads as a run and is the reference in our convention.

Some cases travel with the repository; ``VTP_GOLDEN`` names a folder that holds them all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vtp_core.clock import StepClock
from vtp_core.converting.conversion import Request, convert
from vtp_core.errors import DataFault, StackFault
from vtp_core.generation import Generator
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.importing import Mismatch

GOLDEN = Path(os.environ.get("VTP_GOLDEN", Path(__file__).parents[1] / "golden"))
Off = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Given(StepClock):
    """Draws are those given by name."""

    draws: dict[str, Tensor] = field(default_factory=dict)

    def normal(self, name: str, *shape: int) -> Tensor:
        return self.draws[name]


def file(name: str) -> Path:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{name} does not travel with the repository; set VTP_GOLDEN")
    return path


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max())


def converted(out: Path, name: str, weights: str, *words: str, **more: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these widths are narrow on purpose
        return convert(Request(name, file(weights), words=words, **more), out)


def loaded(run: Path, *overrides: str) -> Generator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Generator.from_pretrained(run, overrides=overrides)


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    return converted(tmp_path / "vae", "ldm", "repa_vavae/vavae.weights", "image_size=16", scale=0.18215)


# ---- generators: format, weights, words, golden file, sign, level of theirs, input of time, output, tolerance

FAMILIES = [
    ("dit", "dit/weights", ["heads=4"], "dit/forward", "out.forward", 5e-5),
    ("sit", "sit/weights", ["heads=4"], "sit/forward", "out.forward", 5e-5),
    ("repa", "repa_e/weights_sit", ["heads=3"], "repa_e/sampling", "out.inference", 5e-5),
    ("lightningdit", "lightningdit/weights_base", [], "lightningdit/forward", "out.base.forward", 2e-5),
    ("ddt", "ddt/weights", ["encoder_blocks=3", "grid=[8,8]"], "ddt/forward", "out.v", 5e-5),
    ("ddt_flat", "ddt/weights_flat", ["grid=[8,8]"], "ddt/forward", "out.flat_dit_forward", 5e-5),
    ("dit_dh", "dit_dh/weights", [], "dit_dh/forward", "out.forward", 1e-4),
    ("lightningdit", "dit_dh/weights_light", [], "dit_dh/forward", "out.lightningdit_forward", 5e-5),
]
TURNED = {
    "out.forward": {"sit"},
    "out.base.forward": {"lightningdit"},
    "out.v": {"ddt"},
    "out.flat_dit_forward": {"ddt_flat"},
}


@pytest.mark.parametrize(("name", "weights", "words", "values", "key", "limit"), FAMILIES)
def test_a_generator_loads_as_a_run_and_speaks_our_noise_level(
    tmp_path: Path, name: str, weights: str, words: list[str], values: str, key: str, limit: float
) -> None:
    generator = loaded(converted(tmp_path / "out", name, weights, *words))
    io = load_file(file(values))
    t, x = io.get("in.t", torch.tensor([0.37])), io.get("in.x", io.get("in.z"))
    turned = name in TURNED.get(key, set())
    u = (t + 1) / 1000 if name == "dit" else 1 - t if turned else t
    with torch.no_grad():
        found = generator.network(x, u, io["in.y"], frozenset({"prediction"}))["prediction"]
    theirs = io[key][:, : found.shape[1]]
    assert far(found, -theirs if turned else theirs) < limit
    assert generator.condition == "label" and len(generator.names) == generator.spec.classes > 0
    assert tuple(generator.spec.grid) == tuple(x.shape[2:]) and generator.spec.channels == x.shape[1]


def test_lightningdit_samples_as_published(tmp_path: Path, off: Off) -> None:
    run = converted(tmp_path / "out", "lightningdit", "lightningdit/weights_base")
    assert loaded(run).protocol == (
        "euler, steps 249, shift 3.3333333333333335, "
        "guidance scale 6.7 interval [0.0, 0.875] channels 3, student weights"
    )
    generator, of = loaded(run, "sampler.steps=9"), load_file(file("lightningdit/sampling"))
    z, y = of["in.z"][:2], of["in.y"][:2]
    x = generator._call(tuple(z.shape), y, Given(draws={"noise": z}))
    assert far(x, of["out.euler.cfg_interval.shift0.3.trajectory"][-1][:2]) < 1e-4
    latents = loaded(run, "sampler.steps=2").latents(2, labels=[1, 2], batch=1)
    assert latents.shape == (2, 8, 8, 8) and latents.isfinite().all()


def test_dit_samples_as_published_and_decodes(tmp_path: Path, vae: Path) -> None:
    words = ("heads=4", "sampler.steps=10", "encoder.image_size=16")
    generator = loaded(converted(tmp_path / "out", "dit", "dit/weights", *words, tokenizer=vae))
    of = load_file(file("dit/sampling"))
    z, y, noise = of["in.loop_x"][:3], of["in.loop_y"][:3], of["in.loop_noise"]
    clock = Given(draws={"noise": z, **{f"step{index}": draw[:3] for index, draw in enumerate(noise)}})
    x = generator._call(tuple(z.shape), y, clock)
    assert far(x, of["out.p_loop.trajectory"][-1][:3]) < 2e-2
    assert far(generator.model.restore(x), x / 0.18215) < 1e-3
    assert generator.sample(2, labels=[1, 2]).shape == (2, 3, 16, 16)


def test_a_tokenizer_goes_with_the_generator_that_was_trained_on_it(tmp_path: Path, vae: Path) -> None:
    with pytest.raises(StackFault, match="latents have 4 channels, the generator's 8"):
        converted(tmp_path / "no", "lightningdit", "lightningdit/weights_base", tokenizer=vae)
    with pytest.raises(StackFault, match=r"are \(4, 4\) cells, .* \(8, 8\); .* encoder\.image_size=16"):
        converted(
            tmp_path / "no", "sit", "sit/weights", "heads=4", "encoder.image_size=8", "encoder.resolution=16",
            "decoder.resolution=16", tokenizer=vae,
        )  # fmt: skip
    bare = converted(tmp_path / "bare", "ldm", "repa_vavae/vavae.weights", "image_size=16")
    with pytest.raises(DataFault, match="no latent statistics"):
        converted(tmp_path / "no", "sit", "sit/weights", "heads=4", tokenizer=bare)
    run = converted(tmp_path / "out", "sit", "sit/weights", "heads=4", tokenizer=bare, scale=0.5)
    assert float(loaded(run).model.statistics["std"][0]) == 2
    with pytest.raises(StackFault, match="grid: the weights don't tell"):
        converted(tmp_path / "no", "ddt", "ddt/weights", "encoder_blocks=3")


def test_repa_es_batch_norm_becomes_the_statistics(tmp_path: Path) -> None:
    run = converted(tmp_path / "out", "repa", "repa_e/weights_sit", "heads=3")
    stored, found = load_file(file("repa_e/weights_sit")), loaded(run).model.statistics
    assert torch.equal(found["mean"], stored["bn.running_mean"])
    assert torch.allclose(found["std"], (stored["bn.running_var"] + 1e-4).sqrt())


def test_labels_have_the_names_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("\n".join("abcdefgh"))
    run = converted(tmp_path / "out", "sit", "sit/weights", "heads=4", labels=str(tmp_path / "names"))
    assert loaded(run).label("c") == 2
    with pytest.raises(StackFault, match="1000 names, but the network knows 8 labels"):
        converted(tmp_path / "no", "sit", "sit/weights", "heads=4", labels="imagenet")


# ---- tokenizers


def test_an_autoencoder_loads_as_a_run(vae: Path, off: Off) -> None:
    tokenizer, io = Tokenizer.from_pretrained(vae), load_file(file("repa_vavae/vavae"))
    z = tokenizer.encode((io["in.image"] + 1) / 2)
    assert off(z, io["out.mean"]) < 1e-5
    assert off(2 * tokenizer.decode(io["out.z"]) - 1, io["out.reconstruction"]) < 1e-5
    assert torch.allclose(tokenizer.encode((io["in.image"] + 1) / 2, standardized=True), z * 0.18215)


def test_rae_loads_as_a_run_with_statistics_by_position(tmp_path: Path, off: Off) -> None:
    io = load_file(file("rae/rae"))
    torch.save({"mean": io["in.latent_mean"], "var": io["in.latent_var"]}, tmp_path / "stat.pt")
    more = {"beside": (file("rae/encoder.weights"),), "statistics": tmp_path / "stat.pt"}
    words = ("image_size=64", "heads=2", "decoder_heads=4")
    run = converted(tmp_path / "out", "rae", "rae/decoder.weights", *words, **more)
    tokenizer = Tokenizer.from_pretrained(run)
    z = tokenizer.encode(io["in.image"])
    assert off(z, io["out.latent"]) < 1e-5
    normal = tokenizer.encode(io["in.image"], standardized=True)
    assert off(normal, io["out.latent_normalised"]) < 1e-5
    assert off(tokenizer.decode(z), io["out.decoded"]) < 1e-5
    assert (
        off(tokenizer.decode(normal[:1], standardized=True), io["out.decoded_from_normalised_first"]) < 1e-5
    )
    assert (
        off(tokenizer.decode(io["in.latent_rand"], standardized=True), io["out.decoded_latent_rand"]) < 1e-5
    )
    with pytest.raises(DataFault, match="encoder: none is among the tensors"):
        converted(tmp_path / "no", "rae", "rae/decoder.weights", *words)


def test_the_whole_model_of_rae_is_one_file(tmp_path: Path, off: Off) -> None:
    whole = {f"decoder.{k}": v for k, v in load_file(file("rae/decoder.weights")).items()}
    whole |= {f"encoder.encoder.{k}": v for k, v in load_file(file("rae/encoder.weights")).items()}
    torch.save({"ema": whole, "model": {}, "step": 7}, tmp_path / "last.pt")
    words = ("image_size=64", "heads=2", "decoder_heads=4")
    convert(Request("rae", tmp_path / "last.pt", words=words), tmp_path / "out")
    io, tokenizer = load_file(file("rae/rae")), Tokenizer.from_pretrained(tmp_path / "out")
    assert off(tokenizer.encode(io["in.image"]), io["out.latent"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("sit", "sit/weights", ("heads=4",)),
        ("ldm", "repa_vavae/vavae.weights", ("image_size=16",)),
        ("lightningdit", "lightningdit/weights_base", ()),
    ],
)
def test_tensors_that_do_not_belong_are_one_table(
    tmp_path: Path, name: str, weights: str, words: Any
) -> None:
    tensors = load_file(file(weights))
    first, second, *_ = sorted(k for k in tensors if k.endswith(".bias") and "final" not in k)
    tensors[second] = torch.zeros(5)
    del tensors[first]
    torch.save(tensors | {"surplus": torch.zeros(1)}, tmp_path / "wrong.pt")
    with pytest.raises(Mismatch) as refused:
        convert(Request(name, tmp_path / "wrong.pt", words=words), tmp_path / "no")
    lines = str(refused.value).splitlines()
    assert f"holds other tensors than {name}'s" in lines[0]
    assert "unknown: surplus (1,)" in lines[1] and f"missing: {first} (" in lines[2]
    assert f"of another shape: {second} (5,) for (" in lines[3]


def test_zeros_are_refused_but_for_those_that_a_new_network_has(tmp_path: Path) -> None:
    tensors = load_file(file("sit/weights"))
    young = {
        name: torch.zeros_like(t)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear")
        else t
        for name, t in tensors.items()
    }
    torch.save(young, tmp_path / "young.pt")
    convert(Request("sit", tmp_path / "young.pt", words=("heads=4",)), tmp_path / "out")
    young["blocks.0.attn.qkv.weight"] = torch.zeros_like(tensors["blocks.0.attn.qkv.weight"])
    torch.save(young, tmp_path / "dead.pt")
    with pytest.raises(
        Mismatch, match=r"sit: values .*\n1 tensor all zero: generator:body\.blocks\.0\.attn\.qkv\.weight \("
    ):
        convert(Request("sit", tmp_path / "dead.pt", words=("heads=4",)), tmp_path / "no")
