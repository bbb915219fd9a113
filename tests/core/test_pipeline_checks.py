"""Pipelines: everything that can be wrong is told before any stage runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_toys import Bench

from vtp_core.errors import DataFault, StackFault
from vtp_core.pipeline.planning import load_pipeline
from vtp_core.stack import load_stack
from vtp_plugins.registry import Registry

FIRST = "a: {stack: tokenizer.yaml}"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            f"{FIRST}, b: {{stack: decoder.yaml, tokenizer: aa}}",
            "stages.b.tokenizer: there is no stage 'aa'; did you mean 'a'?",
        ),
        (f"b: {{stack: decoder.yaml, tokenizer: a}}, {FIRST}", "stages.b.tokenizer: 'a' is no earlier stage"),
        (f"{FIRST}, b: {{stack: decoder.yaml, data: a}}", "stages.b.data: 'a' is no stage of latents"),
        (f"{FIRST}, b: {{latents: {{}}}}", "stages.b: latents are written with a tokenizer: STAGE"),
        (
            "a: {stack: decoder.yaml, tokeniser: b}",
            "stages.a.tokeniser: unknown key; did you mean 'tokenizer'?",
        ),
        ("a: {}", "stages.a: one of stack: NAME and latents: {} is wanted"),
        ("run: {stack: tokenizer.yaml}", "stages.run: no name of a stage"),
        ("a: 3", "stages.a: a mapping is wanted"),
        ("", "stages: a mapping of stages is wanted"),
        ("a: {stack: nothing-such}", "stage a: stack: no stacks 'nothing-such' is installed"),
        ("a: {stack: nothing.yaml}", "stage a: no stack file nothing.yaml"),
        ("a: {stack: {encoder: {use: vitt}, data: {use: dots}}}", "stage a: encoder.use: no encoders 'vitt'"),
    ],
)
def test_what_is_wrong_with_stages_is_told(stages: str, words: str, bench: Bench) -> None:
    bench.source.write_text(f"stages: {{{stages}}}")
    with pytest.raises(StackFault) as told:
        bench.run()
    assert words in str(told.value)
    assert not bench.path.parent.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage: {a: {}}", "unknown key 'stage' in the pipeline; did you mean 'stages'?"),
        ("encoder: {use: vit}", "is a stack, not a pipeline; vtp train"),
        (f"stages: {{{FIRST}}}\nrun: {{path: x}}", "run: unknown key 'path'"),
        ("[1]", "a stack is a mapping"),
    ],
)
def test_what_is_no_pipeline_is_told(text: str, words: str, bench: Bench) -> None:
    bench.source.write_text(text)
    with pytest.raises(StackFault) as told:
        bench.run()
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decodr.train.steps=3", "there is no stage 'decodr'; did you mean 'decoder'?"),
        ("train=3", "write stage.key=value"),
        ("decoder.run.dir=x", "stages live in the pipeline's directory"),
        ("run.path=x", "run: unknown key 'path'"),
        ("generator.train.stepz=3", "stage generator: train.stepz: unknown key; did you mean 'steps'?"),
        ("generator.objectives.drift.cutt=[]", "stage generator: objectives.drift: unknown option 'cutt'"),
        (
            "generator.generator.condition=lebel",
            "stage generator: generator.condition: the data has no 'lebel'; did you mean 'label'",
        ),
        ("~decoder.probes.knn", "stage decoder: override '~probes.knn': there is no 'knn' to remove"),
        (
            "decoder.tokenizer.from=x",
            "stage decoder: tokenizer.from beside tokenizer: tokenizer; leave one out",
        ),
        ("generator.data.path=x", "stage generator: data.path beside data: latents; leave one out"),
        ("latents.fliip=true", "stage latents: latents.fliip: unknown key; did you mean 'flip'?"),
        ("latents.flip=3.5", "stage latents: latents.flip: "),
        ("latents.posterior=meen", "stage latents: latents.posterior: "),
        ("latents.train.steps=3", "write an option of latents as key=value, or data.key=value"),
        ("latents.data.sead=3", "stage latents: data: unknown option 'sead'; did you mean 'seed'?"),
    ],
)
def test_overrides_are_checked(override: str, words: str, bench: Bench) -> None:
    with pytest.raises(StackFault) as told:
        bench.run(override)
    assert words in str(told.value)
    assert not bench.path.parent.exists()


def test_data_that_is_not_there_is_told(bench: Bench) -> None:
    with pytest.raises(DataFault, match="stage latents: "):
        bench.run("latents.data={use: image_folder, root: /nothing}")
    assert not bench.path.parent.exists()


def test_a_stack_may_be_written_out_and_lie_beside_the_pipeline(bench: Bench, tmp_path: Path) -> None:
    (bench.folder / "sub").mkdir()
    bench.source.rename(bench.folder / "sub" / "chain.yaml")
    for name in ("tokenizer", "decoder", "generator"):
        (bench.folder / f"{name}.yaml").rename(bench.folder / "sub" / f"{name}.yaml")
    pipeline = load_pipeline(bench.folder / "sub" / "chain.yaml", (), Registry([bench.plugin]))
    assert [stage.title for stage in pipeline.stages] == ["tokenizer", "decoder", "latents", "generator"]
    text = "stages: {a: {stack: {encoder: {use: vit, image_size: 32}, data: {use: emoji}}, name: mine}}"
    bench.source.write_text(text)
    assert [stage.title for stage in load_pipeline(bench.source).stages] == ["mine"]


def test_overrides_reach_the_stacks_of_their_stages(bench: Bench) -> None:
    changes = ["generator.train.steps=7", "tokenizer.objectives.rebuild.weight=2", "latents.data.seed=3"]
    tree = load_pipeline(bench.source, changes, Registry([bench.plugin])).tree()["stages"]
    assert tree["generator"]["stack"]["train"]["steps"] == 7
    assert tree["generator"]["stack"]["encoder"]["patch"] == 4  # of the stage it starts from
    assert "from" not in tree["generator"]["stack"]["tokenizer"]
    assert tree["tokenizer"]["stack"]["objectives"]["rebuild"] == {"weight": 2}
    assert tree["latents"]["with"] == ["data.seed=3"]


def test_a_pipeline_is_no_stack(bench: Bench) -> None:
    with pytest.raises(StackFault, match="stages"):
        load_stack(bench.source)
