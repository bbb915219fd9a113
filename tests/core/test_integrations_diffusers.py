"""``AutoencoderVTP`` keeps diffusers' contract of autoencoders, and computes what our tokenizer does."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from exports import OFFICIAL, autoencoder_run, golden, same_tensors, same_tokenizer, trained_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtp_core import Tokenizer
from vtp_core.errors import DataFault, StackFault
from vtp_core.export.diffusers_reading import WEIGHTS
from vtp_core.export.writing import export
from vtp_core.integrations.diffusers import AutoencoderVTP
from vtp_plugins.importing import Mismatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("integration") / "out"
    export(trained_run(), out, "diffusers")
    return out


@pytest.fixture
def model(exported: Path) -> Any:
    return AutoencoderVTP.from_pretrained(exported).requires_grad_(False)


def pictures(model: Any, rows: int = 3) -> Tensor:
    return 2 * torch.rand(rows, 3, *model.spec.size) - 1


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max())


def off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- it computes what our tokenizer does


@pytest.mark.parametrize("source", [trained_run, autoencoder_run, lambda: OFFICIAL])
def test_it_is_our_tokenizer_in_diffusers_conventions(source: Callable[[], Path], tmp_path: Path) -> None:
    export(source(), tmp_path / "out", "diffusers")
    model = AutoencoderVTP.from_pretrained(tmp_path / "out").requires_grad_(False)
    tokenizer, x = Tokenizer.from_pretrained(source()), pictures(model)
    known = bool(tokenizer.statistics)
    z = model.encode(x).latent
    assert far(z, tokenizer.encode(x / 2 + 0.5, standardized=known)) <= 5e-5
    assert far(model.decode(z).sample, 2 * tokenizer.decode(z, standardized=known) - 1) <= 5e-5


@pytest.mark.parametrize("source", [trained_run, autoencoder_run, lambda: OFFICIAL])
def test_in_bfloat16_it_is_no_farther_off_than_our_tokenizer(
    source: Callable[[], Path], tmp_path: Path
) -> None:
    export(source(), tmp_path / "out", "diffusers")
    model = AutoencoderVTP.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16).requires_grad_(False)
    exact, narrow = Tokenizer.from_pretrained(source()), Tokenizer.from_pretrained(source()).bfloat16()
    x, known = pictures(model).bfloat16(), bool(exact.statistics)
    images = x.float() / 2 + 0.5
    both = ((exact, torch.float32), (narrow, torch.bfloat16))
    z, theirs = (tok.encode(images.to(dtype), standardized=known) for tok, dtype in both)
    found = model.encode(x).latent
    assert (model.dtype, found.dtype) == (torch.bfloat16, torch.bfloat16)
    assert off(found, z) <= min(2e-2, 1.1 * off(theirs, z))
    shown, theirs = (2 * tok.decode(z.to(dtype), standardized=known) - 1 for tok, dtype in both)
    assert off(model.decode(z.bfloat16()).sample, shown) <= min(2e-2, 1.1 * off(theirs, shown))


def test_a_posterior_is_standardised_like_its_latent(tmp_path: Path) -> None:
    export(autoencoder_run(), tmp_path / "out", "diffusers")
    model = AutoencoderVTP.from_pretrained(tmp_path / "out").requires_grad_(False)
    io, scale = golden("repa_vavae/vavae"), 0.18215
    found = model.encode(io["in.image"])
    assert far(found.latent_dist.mean / scale, io["out.mean"]) < 1e-4
    assert far(found.latent_dist.std / scale, (0.5 * io["out.logvar_clamped"]).exp()) < 1e-4
    assert torch.equal(found.latent_dist.mode(), found.latent)
    draws = torch.stack([found.latent_dist.sample() for _ in range(2000)])
    assert off(draws.std(0), found.latent_dist.std) < 0.05
    assert far(model.decode(io["out.z"] * scale).sample, io["out.reconstruction"]) < 1e-4


def test_a_latent_without_a_posterior_is_its_own_distribution(model: Any) -> None:
    found = model.encode(pictures(model))
    assert torch.equal(found.latent_dist.sample(), found.latent)
    assert torch.equal(found.latent_dist.mode(), found.latent)
    assert model.config.scaling_factor == 1.0


def test_statistics_are_those_of_the_data(exported: Path, model: Any) -> None:
    config = json.loads((exported / "config.json").read_text())
    statistics = Tokenizer.from_pretrained(trained_run()).statistics
    assert torch.equal(torch.tensor(config["latents_mean"]), statistics["mean"])
    assert torch.equal(torch.tensor(config["latents_std"]), statistics["std"])
    assert (model.config.latent_channels, model.config.sample_size) == (8, 32)
    assert model.config.spatial_compression_ratio == 16


# ---- what diffusers asks of every model


def test_saving_and_loading_change_nothing(exported: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert same_tokenizer(exported, tmp_path / "saved")
    assert same_tensors(load_file(exported / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS))
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (exported, tmp_path / "saved"))
    assert ours == {
        key: value for key, value in theirs.items() if key not in {"_diffusers_version", "_name_or_path"}
    }
    again, x = AutoencoderVTP.from_pretrained(tmp_path / "saved"), pictures(model)
    assert far(again(x).sample, model(x).sample) <= 5e-5


def test_files_in_shards_are_read_by_both(exported: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("diffusion_pytorch_model-*.safetensors"))) > 1
    assert same_tokenizer(exported, tmp_path / "saved")
    again, x = AutoencoderVTP.from_pretrained(tmp_path / "saved"), pictures(model)
    assert torch.equal(again(x).sample, model(x).sample)


def test_it_is_deterministic_and_can_be_copied(model: Any) -> None:
    x = pictures(model)
    assert far(model(x).sample, model(x).sample) <= 1e-5
    assert torch.equal(copy.deepcopy(model)(x).sample, model(x).sample)
    assert torch.equal(AutoencoderVTP.from_config(model.config).load_state_dict(model.state_dict()) and x, x)


def test_tuples_come_where_no_dictionary_is_wanted(model: Any) -> None:
    x = pictures(model)
    (z,) = model.encode(x, return_dict=False)
    (sample,) = model.decode(z, return_dict=False)
    assert torch.equal(z, model.encode(x).latent)
    assert torch.equal(sample, model(x, return_dict=False)[0])
    assert torch.equal(sample, model(x, sample_posterior=True).sample)


def test_slices_give_what_the_batch_gives(model: Any) -> None:
    x = pictures(model)
    z, whole = model.encode(x).latent, model(x).sample
    model.enable_slicing()
    assert far(model.encode(x).latent, z) <= 1e-5
    assert far(model.encode(x).latent_dist.mode(), z) <= 1e-5
    assert far(model(x).sample, whole) <= 1e-5
    model.disable_slicing()
    assert torch.equal(model(x).sample, whole)


def test_tiles_are_refused_since_they_would_differ(model: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"whole picture[\s\S]*enable_slicing"):
        model.enable_tiling()
    assert not getattr(model, "use_tiling", False)


def test_pictures_of_other_sizes_pass(model: Any) -> None:
    assert model(torch.zeros(1, 3, 48, 32)).sample.shape == (1, 3, 48, 32)
    assert (
        model.to(torch.float64)(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).sample.dtype == torch.float64
    )


def test_a_pipeline_samples_with_it_and_is_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=16, num_layers=1, sample_size=2,
        patch_size=1, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = DiTPipeline(network.eval(), model, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    drawn: Any = {"class_labels": [1, 2], "num_inference_steps": 2, "output_type": "np"}
    images = pipeline(**drawn, generator=torch.manual_seed(0)).images
    assert images.shape == (2, 32, 32, 3)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = DiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(again.vae, AutoencoderVTP)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(again(**drawn, generator=torch.manual_seed(0)).images, images, atol=5e-5)


def test_it_trains(exported: Path) -> None:
    model = AutoencoderVTP.from_pretrained(exported).train()
    model(pictures(model)).sample.square().mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.partition(".")[0] for name in reached} == {"encoder", "bottleneck", "decoder"}


def test_weights_that_wait_for_a_checkpoint_learn_that_it_came(tmp_path: Path) -> None:
    from vtp_core.converting.conversion import Request, convert

    folder = OFFICIAL.parents[1] / "rae"
    words = ("image_size=64", "heads=2", "decoder_heads=4")
    request = Request(
        "rae",
        folder / "decoder.weights.safetensors",
        words=words,
        beside=(folder / "encoder.weights.safetensors",),
    )
    export(convert(request, tmp_path / "run"), tmp_path / "out", "diffusers")
    io = golden("rae/rae")
    model = AutoencoderVTP.from_pretrained(tmp_path / "out").requires_grad_(False)
    assert off(model.encode(2 * io["in.image"] - 1).latent, io["out.latent"]) < 1e-5


# ---- what is refused


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {"diffusers", *(name for name in sys.modules if name.startswith("diffusers."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "vtp_core.integrations.diffusers")
    with pytest.raises(ImportError, match=r"pip install 'vtp-plugins\[diffusers\]'"):
        importlib.import_module("vtp_core.integrations.diffusers")


def broken(exported: Path, out: Path, state: dict[str, Tensor] | None = None, **fields: Any) -> Path:
    out.mkdir()
    save_file(load_file(exported / WEIGHTS) if state is None else state, out / WEIGHTS)
    config = json.loads((exported / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder.norm.weight", None, r"1 tensor missing: encoder\.norm\.weight"),
        ("extra", torch.ones(1), "1 tensor unexpected: extra"),
        ("decoder.norm.bias", torch.ones(3), r"size mismatch for decoder\.norm\.bias"),
        ("encoder.cls_token", torch.full((1, 1, 32), torch.nan), r"not finite: encoder\.cls_token NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    exported: Path, tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    state = {**load_file(exported / WEIGHTS), name: value}
    path = broken(exported, tmp_path / "out", {key: v for key, v in state.items() if v is not None})
    with pytest.raises(Mismatch, match=message):
        AutoencoderVTP.from_pretrained(path)


def test_no_pickle_is_ever_read(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors only"):
        AutoencoderVTP.from_pretrained(exported, use_safetensors=False)
    bare = broken(exported, tmp_path / "bare")
    (bare / WEIGHTS).unlink()
    torch.save(load_file(exported / WEIGHTS), bare / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderVTP.from_pretrained(bare)


def test_only_known_fields_of_a_configuration_are_read(exported: Path, tmp_path: Path) -> None:
    hostile = {
        "auto_map": {"AutoModel": "evil.AutoencoderVTP"},
        "trust_remote_code": True,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "_target_": "os.system",
    }
    model = AutoencoderVTP.from_pretrained(broken(exported, tmp_path / "hostile", **hostile))
    assert not hostile.keys() & model.config.keys()
    with pytest.raises(DataFault, match="_class_name"):
        AutoencoderVTP.from_pretrained(
            broken(exported, tmp_path / "other", _class_name="StableDiffusionPipeline")
        )
    with pytest.raises(StackFault, match=r"os\.system"):
        AutoencoderVTP.from_pretrained(
            broken(exported, tmp_path / "named", stack={"encoder": {"use": "os.system"}})
        )
    with pytest.raises(StackFault, match="no decoder"):
        AutoencoderVTP(stack={"encoder": {"use": "vit", "patch": 16, "image_size": 32}})
