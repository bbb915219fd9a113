"""Pipelines: what is run again, what is not, and artefacts that are not what they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipeline_toys import STAGES, Bench
from small import STACK

from vtp_core import load_stack, train
from vtp_core.errors import DataFault, StackFault
from vtp_core.pipeline import is_pipeline
from vtp_core.pipeline.directory import PipelineDirectory, read_record
from vtp_core.pipeline.planning import load_pipeline
from vtp_core.pipeline.running import run_pipeline
from vtp_plugins.registry import Registry

PLAIN = [f"objectives.{name}=null" for name in ("clip", "dino", "ibot", "koleo")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """An undisturbed pipeline."""
    bench = Bench(tmp_path_factory.mktemp("finished"))
    bench.run()
    return bench


@pytest.fixture
def bench(finished: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A copy of what the undisturbed one left."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.path, tmp_path / "runs" / "chain")
    return Bench(tmp_path)


# ---- what is run again, and what is not


def test_a_pipeline_leaves_its_stages_and_a_record(finished: Bench) -> None:
    record = read_record(finished.path / "pipeline.json")
    assert (record["status"], list(record["stages"])) == ("finished", STAGES)
    for name, entry in record["stages"].items():
        assert (entry["status"], entry["dir"]) == ("finished", name)
        assert len(entry["key"]) == len(entry["artefact"]) == 64
        assert entry["seconds"] > 0
    assert is_pipeline(finished.path)
    assert not is_pipeline(finished.path / "decoder")
    assert finished.ran == STAGES
    assert finished.lines[0] == f"stage 1/4 tokenizer: tokenizer, {finished.path / 'tokenizer'}"


def test_a_stage_reads_the_directories_of_others(finished: Bench) -> None:
    stack = (finished.path / "generator" / "stack.yaml").read_text()
    assert f"from: {finished.path / 'decoder'}" in stack
    assert f"path: {finished.path / 'latents'}" in stack


def test_a_finished_pipeline_is_skipped_wherever_it_was_moved(bench: Bench) -> None:
    before = bench.artefacts
    bench.run()
    assert bench.lines == [
        f"stage {n}/4 {name}: skipped: finished, hash {str(before[name])[:8]}, {bench.path / name}"
        for n, name in enumerate(STAGES, 1)
    ]
    bench.resume()
    assert bench.ran == []


def test_a_change_runs_exactly_what_depends_on_it(bench: Bench) -> None:
    first = bench.artefacts
    bench.run("generator.train.steps=2")
    assert bench.ran == ["generator"]
    assert (bench.path / "generator-2" / "run.json").is_file()
    bench.run("latents.flip=false")
    assert bench.ran == ["latents", "generator"]
    bench.run("decoder.train.seed=1")
    assert bench.ran == ["decoder", "latents", "generator"]
    assert bench.artefacts["tokenizer"] == first["tokenizer"]
    bench.run()
    assert (bench.ran, bench.artefacts) == ([], first)  # what another override had made is kept


def test_changed_data_runs_what_reads_it(bench: Bench) -> None:
    bench.run("latents.data.seed=1")
    assert bench.ran == ["latents", "generator"]


def test_what_other_pipelines_have_is_taken(bench: Bench) -> None:
    other = bench.path.with_name("other")
    run_pipeline(
        bench.source, [f"run.dir={other}", "generator.train.steps=2"], Registry([bench.plugin]), bench.note
    )
    assert bench.ran == ["generator"]
    assert read_record(other / "pipeline.json")["stages"]["decoder"]["dir"] == "../chain/decoder"
    assert f"from: {bench.path / 'decoder'}" in (other / "generator" / "stack.yaml").read_text()


def test_an_edited_plugin_runs_the_stages_that_name_it(bench: Bench) -> None:
    mine = bench.folder / "mine.py"
    mine.write_text("class Mine:\n    def __init__(self, spec): ...\nPLUGINS = {'hooks': {'mine': Mine}}\n")
    change = [f"run.dir={bench.path}", "generator.hooks={mine: {}}"]
    for ran in (["generator"], [], ["generator"]):
        bench.lines.clear()
        run_pipeline(bench.source, change, Registry([bench.plugin, mine]), note=bench.note)
        assert bench.ran == ran
        if not ran:
            mine.write_text(mine.read_text() + "# better\n")


def test_the_written_pipeline_is_the_same_pipeline(bench: Bench) -> None:
    registry = Registry([bench.plugin])
    again = load_pipeline(bench.path, registry=registry)
    assert again.digest == load_pipeline(bench.source, registry=registry).digest
    assert again.yaml() == (bench.path / "pipeline.yaml").read_text()


def test_without_a_directory_the_same_command_goes_on_in_the_same_one(bench: Bench) -> None:
    registry, text = Registry([bench.plugin]), "stages: {tokenizer: {stack: tokenizer.yaml}}"
    (bench.folder / "one.yaml").write_text(text, encoding="utf-8")
    path = run_pipeline("one.yaml", [], registry, bench.note).path
    assert path.parent == Path("runs")
    assert path.name.split("-", 3)[3].startswith("one-")
    assert run_pipeline("one.yaml", [], registry, bench.note).path == path
    assert run_pipeline("one.yaml", ["tokenizer.train.steps=1"], registry, bench.note).path != path
    assert len(bench.lines) == 3
    assert bench.ran == ["tokenizer"]  # the others took the one that the chain beside them has


# ---- runs of vtp train


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A pipeline of one stage whose components are all installed."""
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path)
    (tmp_path / "small.yaml").write_text(STACK, encoding="utf-8")
    bench.source.write_text(f"stages: {{tokenizer: {{stack: small.yaml, with: [{', '.join(PLAIN)}]}}}}")
    return bench


def test_a_run_of_vtp_train_is_taken(plain: Bench) -> None:
    run = train(load_stack("small.yaml", [*PLAIN, "train.steps=2", "run.dir=runs/mine"])).path
    plain.run("tokenizer.train.steps=2")
    assert plain.ran == []
    assert plain.lines[0].endswith(str(plain.path.with_name("mine")))
    plain.run("tokenizer.train.steps=1")
    assert plain.ran == ["tokenizer"]
    text = (run / "stack.yaml").read_text()
    (run / "stack.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    plain.run("tokenizer.train.steps=2", "tokenizer.train.seed=1")
    assert plain.ran == ["tokenizer"]  # the file says so, but the run was another


# ---- artefacts that are not what they were


def test_a_deleted_artefact_is_made_again_and_what_follows_stays(bench: Bench) -> None:
    before = bench.artefacts
    shutil.rmtree(bench.path / "decoder")
    bench.run()
    assert f"stage decoder: not taken: {bench.path / 'decoder'} is gone" in bench.lines
    assert bench.ran == ["decoder"]  # bit by bit the same, so nothing that depends on it is run
    assert bench.artefacts == before


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("decoder", "checkpoints/step-00000003/tokenizer.safetensors"),
        ("latents", "latents-00002.safetensors"),
        ("latents", "statistics.safetensors"),
    ],
)
def test_a_tampered_artefact_is_noticed(stage: str, file: str, bench: Bench) -> None:
    before, path = bench.artefacts, bench.path / stage / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    bench.run()
    assert bench.ran == [stage]
    assert "another sha256 than its manifest says" in "".join(bench.lines)
    assert (bench.artefacts, (bench.path / f"{stage}-2").is_dir()) == (before, True)


def test_another_artefact_in_its_place_is_noticed(bench: Bench) -> None:
    """Well-formed, of the same stack, but not the one that was recorded."""
    record = read_record(bench.path / "pipeline.json")
    record["stages"]["tokenizer"]["artefact"] = "0" * 64
    (bench.path / "pipeline.json").write_text(json.dumps(record))
    bench.run()
    assert "has another hash than when it was finished" in bench.lines[0]
    assert bench.ran == ["tokenizer"]


def test_a_changed_stack_of_a_stage_is_noticed(bench: Bench) -> None:
    file = bench.path / "generator" / "stack.yaml"
    file.write_text(file.read_text().replace("steps: 4", "steps: 5"))
    bench.run()
    assert "stack.yaml was changed since" in "".join(bench.lines)
    assert bench.ran == ["generator"]


def test_a_broken_record_is_a_fault(bench: Bench) -> None:
    (bench.path / "pipeline.json").write_text('{"format": 1, "stages": {"tokenizer": {}}, "earlier": []}')
    with pytest.raises(DataFault, match=r"pipeline\.json is no record of format 1"):
        bench.run()


# ---- the directory


def test_two_processes_cannot_have_one_pipeline(bench: Bench) -> None:
    with PipelineDirectory.open(bench.path):
        for begin in (bench.run, bench.resume):
            with pytest.raises(StackFault, match="is in use by"):
                begin()
    bench.run()


def test_a_directory_of_something_else_is_refused(bench: Bench) -> None:
    bench.path = bench.path / "tokenizer"
    with pytest.raises(StackFault, match=r"is not empty .*choose another run\.dir"):
        bench.run()
    with pytest.raises(DataFault, match="is no pipeline directory"):
        bench.resume()


def test_several_processes_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StackFault, match="a pipeline is run by one process"):
        bench.run()
