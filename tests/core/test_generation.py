"""Starting from an earlier run, training a generator on it, and sampling: by label, by text, by hook."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import run, write_stack

from vtp_core import Tokenizer, load_stack, train
from vtp_core.errors import DataFault, StackFault
from vtp_core.generation import Generator, noise_of
from vtp_core.run import checkpoint
from vtp_core.statistics import digest

GENERATOR = """
size: tiny
data: {use: emoji, batch_size: 8, workers: 0}
tokenizer: {frozen: [encoder, bottleneck, decoder]}
generator:
  use: lightningdit
  width: 32
  depth: 2
  heads: 2
  path: {use: linear}
  condition: label
  drop_condition: 0.2
  ema: {decay: 0.99}
sampler: {use: euler, steps: 3, guidance: {scale: 2.0}}
objectives: {flow: {}}
train: {steps: 2, seed: 0}
"""
CLIP = ["~objectives.dino", "~objectives.ibot", "~objectives.koleo"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    stack = load_stack(write_stack(folder), [*CLIP, "train.steps=2", f"run.dir={folder / 'run'}"])
    return train(stack).path


def trained(tokenizer: Path, folder: Path, *changes: str, text: str = GENERATOR) -> Path:
    source = folder / "generator.yaml"
    source.write_text(text)
    stack = load_stack(source, [f"tokenizer.from={tokenizer}", f"run.dir={folder / 'run'}", *changes])
    return train(stack).path


@pytest.fixture(scope="module")
def generator(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tokenizer, tmp_path_factory.mktemp("generator"))


def tensors(path: Path, part: str) -> dict[str, Any]:
    found = checkpoint.latest(path / "checkpoints")
    assert found is not None
    return load_file(found / f"{part}.safetensors")


def test_the_tokenizer_of_a_generator_run_is_the_earlier_one_whole(tokenizer: Path, generator: Path) -> None:
    before, after = Tokenizer.from_pretrained(tokenizer), Tokenizer.from_pretrained(generator)
    images = torch.rand(2, 3, *before.spec.size)
    assert torch.equal(before.encode(images, standardized=True), after.encode(images, standardized=True))
    assert torch.equal(before.decode(before.encode(images)), after.decode(after.encode(images)))
    assert torch.equal(before.embed_text(["a flag"]), after.embed_text(["a flag"]))  # clip travels on
    assert torch.equal(after.statistics["of"], digest(tensors(tokenizer, "tokenizer")))


def test_a_run_needs_its_source_no_longer(tokenizer: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tokenizer, tmp_path / "source")
    path = trained(source, tmp_path)
    shutil.rmtree(source)
    assert Generator.from_pretrained(path).sample(2).shape == (2, 3, 32, 32)
    assert Tokenizer.from_pretrained(path).exports("embed_text")


def test_only_the_generator_and_its_average_move(tokenizer: Path, generator: Path) -> None:
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            tensors(tokenizer, "tokenizer").values(), tensors(generator, "tokenizer").values(), strict=True
        )
    )
    live, average = tensors(generator, "generator"), tensors(generator, "generator.ema")
    assert {f"generator.{name}" for name in live} == set(average)
    assert any(not torch.equal(live[name], average[f"generator.{name}"]) for name in live)


def test_the_average_warms_up(tokenizer: Path, tmp_path: Path) -> None:
    """After t steps the decay is (1 + t) / (10 + t): by hand for two steps."""
    text = GENERATOR.replace("steps: 2, seed", "steps: 2, checkpoint_every: 1, keep: 9, seed")
    path = trained(tokenizer, tmp_path, text=text)
    folder = path / "checkpoints"
    one, two = (load_file(folder / f"step-0000000{i}" / "generator.safetensors") for i in (1, 2))
    first = load_file(folder / "step-00000001" / "generator.ema.safetensors")
    second = load_file(folder / "step-00000002" / "generator.ema.safetensors")
    for name in one:
        expected = first[f"generator.{name}"].lerp(two[name], 1 - 2 / 11)
        torch.testing.assert_close(second[f"generator.{name}"], expected)


def test_a_sample_is_a_function_of_its_seed_and_number_alone(generator: Path) -> None:
    found = Generator.from_pretrained(generator)
    whole = found.latents(5, labels=[0, 1, 2, 3, 4], seed=3, batch=5)
    parts = found.latents(5, labels=[0, 1, 2, 3, 4], seed=3, batch=2)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    later = found.latents(2, labels=[3, 4], seed=3, first=3)
    torch.testing.assert_close(whole[3:], later, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, found.latents(5, labels=[0, 1, 2, 3, 4], seed=4))
    assert found.evaluations == 3
    again = found.from_noise(noise_of(found, 5, seed=3), torch.arange(5))
    torch.testing.assert_close(again, found.sample(5, labels=[0, 1, 2, 3, 4], seed=3), rtol=1e-3, atol=1e-4)
    assert "euler, steps 3, guidance scale 2.0, ema weights" in found.protocol


def test_two_ways_to_write_guidance_are_one_protocol(generator: Path) -> None:
    found = [
        Generator.from_pretrained(generator, overrides=[f"sampler.guidance.channels={value}"]).protocol
        for value in ("3", "first_3")
    ]
    assert found[0] == found[1]
    assert "channels 3" in found[0]


def test_labels_go_by_name_or_number(generator: Path) -> None:
    found = Generator.from_pretrained(generator, weights="student")
    assert (
        found.label("country flag")
        == found.names.index("country flag")
        == found.label(str(found.label("country flag")))
    )
    with pytest.raises(StackFault, match="did you mean 'country flag'"):
        found.label("country flg")
    with pytest.raises(StackFault, match="conditioned on label, not on texts"):
        found.sample(1, texts=["a flag"])
    with pytest.raises(StackFault, match="2 conditions for 3 samples"):
        found.sample(3, labels=[0, 1])


def test_captions_condition_through_what_the_tokenizer_exports(tokenizer: Path, tmp_path: Path) -> None:
    path = trained(tokenizer, tmp_path, "generator.condition=text")
    found = Generator.from_pretrained(path)
    assert found.spec.condition == "embedding"
    one, other = found.latents(2, texts=["a flag", "a cat"], seed=0), found.latents(2, seed=0)
    assert not torch.allclose(one, other)  # without texts it is the null condition
    torch.testing.assert_close(one[:1], found.latents(1, texts=["a flag"], seed=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(StackFault, match="conditioned on text, not on labels"):
        found.label("country flag")


def test_a_generator_needs_no_condition(tokenizer: Path, tmp_path: Path) -> None:
    path = trained(
        tokenizer, tmp_path, "generator.condition=null", "generator.drop_condition=0", "sampler.guidance=null"
    )
    found = Generator.from_pretrained(path)
    assert found.spec.condition == ""
    assert found.sample(2, seed=1).shape == (2, 3, 32, 32)
    with pytest.raises(StackFault, match="conditioned on nothing, not on labels"):
        found.sample(1, labels=[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("generator.condition=null",), "no condition"),
        (("generator.drop_condition=0",), "null condition would never be trained"),
        (("sampler.guidance={scal: 2}",), "did you mean 'scale'"),
        (("sampler.reuse={keep: 9}",), "reuse"),
        (("sampler.guidance={use: auto, scale: 2}",), "weak"),
        (("sampler.weak=runs/x",), "no run directory"),
        (("sampler.guidance.channels=first_300",), "the first 300 of 8 channels"),
        (("generator.condition=none",), "null is none"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused_before_training(
    tokenizer: Path, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises((StackFault, DataFault), match=message):
        trained(tokenizer, tmp_path, *changes)
    assert not (tmp_path / "run").exists()


def test_a_hook_can_wrap_sampling(tokenizer: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "hook.py"
    plugin.write_text(
        "from vtp_plugins.hookspecs import hookimpl\n"
        "class Zero:\n"
        "    def __init__(self, spec): pass\n"
        "    @hookimpl(wrapper=True)\n"
        "    def vtp_sample(self, call, shape):\n"
        "        z = yield\n"
        "        return z * 0\n"
        "PLUGINS = {'hooks': {'zero': Zero}}\n"
    )
    from vtp_plugins.registry import Registry

    source = tmp_path / "generator.yaml"
    source.write_text(GENERATOR + "hooks: {zero: {}}\n")
    stack = load_stack(
        source, [f"tokenizer.from={tokenizer}", f"run.dir={tmp_path / 'run'}"], Registry([plugin])
    )
    path = train(stack).path
    found = Generator.of_stack(stack, path)
    assert torch.equal(found.latents(2, standardized=True), torch.zeros(2, 8, 4, 4))


def test_the_command_writes_a_grid(
    generator: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grid.png"
    code, shown, _ = run(
        capsys,
        "generate",
        str(generator),
        "sampler.steps=2",
        "--label",
        "country flag",
        "--n",
        "4",
        "-o",
        str(out),
    )
    assert code == 0
    assert "4 samples, seed 0, 2 evaluations each" in shown
    assert out.stat().st_size > 0
    words = ["--label", "heart", "--label", "geometric"]
    code, _, errors = run(capsys, "generate", str(generator), *words, "--n", "1", "-o", str(out))
    assert (code, "fewer samples than the 2 labels" in errors) == (2, True)
    code, _, errors = run(capsys, "generate", str(generator), "--text", "a flag", "-o", str(out))
    assert (code, "not on texts" in errors) == (2, True)
    code, _, errors = run(capsys, "generate", str(generator), "-o", str(tmp_path / "grid.txt"))
    assert (code, "names a picture" in errors) == (7, True)


def test_a_run_without_a_generator_says_what_trains_one(
    tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = run(capsys, "generate", str(tokenizer))
    assert (code, "tokenizer.from=RUN" in errors) == (2, True)


def test_resuming_takes_everything_from_the_checkpoint(tokenizer: Path, tmp_path: Path) -> None:
    whole = (
        trained(tokenizer, tmp_path / "a", "train.steps=4") if (tmp_path / "a").mkdir() is None else tmp_path
    )
    (tmp_path / "b").mkdir()
    path = trained(tokenizer, tmp_path / "b", "train.steps=4", "train.checkpoint_every=2", "train.keep=9")
    shutil.rmtree(path / "checkpoints" / "step-00000004")
    import json

    record = path / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))
    from vtp_core.stack import load_run_stack
    from vtp_plugins.registry import Registry

    train(load_run_stack(path, Registry()), resume=path)
    for part in ("generator", "generator.ema", "statistics", "exports.clip", "tokenizer"):
        one, two = tensors(whole, part), tensors(path, part)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_latents_that_are_not_standardised_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(StackFault, match="not standardised: freeze the tokenizer"):
        trained(tokenizer, tmp_path, "tokenizer.frozen=[decoder]")


def test_statistics_that_are_missing_are_computed_first(tokenizer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    found = checkpoint.latest(copy / "checkpoints")
    assert found is not None
    parts, state = checkpoint.load(found)
    checkpoint.save(copy / "checkpoints", 3, {k: v for k, v in parts.items() if k != "statistics"}, state)
    path = trained(copy, tmp_path)
    computed, known = tensors(path, "statistics"), tensors(tokenizer, "statistics")
    assert computed.keys() == known.keys()
    assert all(torch.equal(computed[name], known[name]) for name in known)


def test_statistics_of_another_tokenizer_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tokenizer, tmp_path / "copy")
    found = checkpoint.latest(copy / "checkpoints")
    assert found is not None
    parts, state = checkpoint.load(found)
    name = next(key for key in parts["tokenizer"] if key.startswith("encoder."))
    tokenizer_part = {**parts["tokenizer"], name: parts["tokenizer"][name] + 1}
    checkpoint.save(copy / "checkpoints", 3, {**parts, "tokenizer": tokenizer_part}, state)
    with pytest.raises(DataFault, match="latent statistics belong to the tokenizer"):
        trained(copy, tmp_path)


def test_fine_tuning_starts_from_the_earlier_weights_and_lists_what_is_new(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [*CLIP, "train.steps=1", f"tokenizer.from={tokenizer}", f"run.dir={tmp_path / 'run'}"]
    code, _, errors = run(capsys, "train", str(write_stack(tmp_path)), *changes, "train.optim.lr=1e-12")
    assert code == 0
    assert f"tokenizer from {tokenizer}" in errors
    before, after = tensors(tokenizer, "tokenizer"), tensors(tmp_path / "run", "tokenizer")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    code, _, errors = run(
        capsys,
        "train",
        str(write_stack(tmp_path)),
        *CLIP,
        f"tokenizer.from={tokenizer}",
        "bottleneck.channels=4",
    )
    assert (code, "weights do not fit the stack" in errors) == (2, True)


def test_no_run_to_start_from_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, "plan", "lightningdit-tiny", f"tokenizer.from={tmp_path}")
    assert (code, str(tmp_path) in errors) == (4, True)
    code, _, errors = run(capsys, "plan", "lightningdit-tiny")
    assert (code, "tokenizer.from=RUN" in errors) == (2, True)
