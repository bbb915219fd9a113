"""Pipelines: what is checked before anything runs, what is run again, what is not, and how they resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import STACK

from vtp_core import load_stack, train
from vtp_core.errors import DataFault, NonFinite, PluginFault, StackFault
from vtp_core.pipeline import is_pipeline
from vtp_core.pipeline.directory import PipelineDirectory, read_record
from vtp_core.pipeline.planning import load_pipeline
from vtp_core.pipeline.running import resume_pipeline, run_pipeline
from vtp_core.stopping import Preempted
from vtp_plugins.registry import Registry

MUTE = ["objectives.clip=null", "objectives.dino=null", "objectives.ibot=null", "objectives.koleo=null"]
DECODER = """
data: {use: emoji, batch_size: 16, workers: 0}
tokenizer: {frozen: [encoder, bottleneck]}
objectives:
  reconstruction: {weight: 1.0, lpips: 0.0}
train: {steps: 4, seed: 0, checkpoint_every: 1}
"""
TWO = f"""
stages:
  tokenizer: {{stack: small.yaml, with: [{", ".join(MUTE)}]}}
  decoder: {{stack: decoder.yaml, tokenizer: tokenizer}}
"""
PLUGIN = Path(__file__).with_name("faulty.py")
KILLER = """
import os, signal
from pathlib import Path
from vtp_plugins.hookspecs import hookimpl

class Killer:
    def __init__(self, spec, *, at: int, signs: str):
        self.at, self.sign = at, Path(signs) / str(at)

    @hookimpl
    def vtp_step_end(self, engine, clock, metrics):
        if metrics["step"] == self.at and not self.sign.exists():
            self.sign.touch()
            os.kill(os.getpid(), signal.SIGKILL)

PLUGINS = {"hooks": {"killer": Killer}}
"""
Run = Callable[..., PipelineDirectory]


def write(folder: Path, text: str = TWO) -> Path:
    """A pipeline and its stacks as files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(STACK, encoding="utf-8")
    (folder / "decoder.yaml").write_text(DECODER, encoding="utf-8")
    (folder / "two.yaml").write_text(text, encoding="utf-8")
    return folder / "two.yaml"


def artefacts(path: Path) -> dict[str, str]:
    return {name: entry["artefact"] for name, entry in read_record(path / "pipeline.json")["stages"].items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One undisturbed pipeline, in ``runs/two``."""
    folder = tmp_path_factory.mktemp("finished")
    return run_pipeline(write(folder), [f"run.dir={folder / 'runs' / 'two'}"], note=lambda line: None).path


class Bench:
    """A working directory with the pipeline and a copy of what the undisturbed one left; keeps its lines."""

    def __init__(self, folder: Path, finished: Path | None) -> None:
        self.source = write(folder)
        self.path = folder / "runs" / "two"
        self.lines: list[str] = []
        if finished is not None:
            shutil.copytree(finished, self.path)

    def run(self, *overrides: str, source: Path | None = None) -> PipelineDirectory:
        self.lines.clear()
        return run_pipeline(
            source or self.source, [f"run.dir={self.path}", *overrides], note=self.lines.append
        )

    def ran(self) -> list[str]:
        """Stages that were not skipped."""
        heads = [line for line in self.lines if line.startswith("stage ") and "/" in line.split()[1]]
        return [line.split()[2].rstrip(":") for line in heads if "skipped" not in line]


@pytest.fixture
def bench(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, finished)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, None)


# ---- what is run again, and what is not


def test_a_pipeline_leaves_its_stages_and_a_record(finished: Path) -> None:
    record = read_record(finished / "pipeline.json")
    assert (record["status"], list(record["stages"])) == ("finished", ["tokenizer", "decoder"])
    for name, entry in record["stages"].items():
        assert (entry["status"], entry["dir"]) == ("finished", name)
        assert len(entry["key"]) == len(entry["artefact"]) == 64
        assert entry["seconds"] > 0
        assert json.loads((finished / name / "run.json").read_text())["status"] == "finished"
    assert is_pipeline(finished)
    assert not is_pipeline(finished / "decoder")


def test_a_finished_pipeline_is_skipped_wherever_it_was_moved(bench: Bench) -> None:
    before = artefacts(bench.path)
    bench.run()
    assert bench.lines == [
        f"stage {n}/2 {name}: skipped: finished, hash {before[name][:8]}, {bench.path / name}"
        for n, name in enumerate(before, 1)
    ]


def test_a_change_runs_exactly_what_depends_on_it(bench: Bench) -> None:
    first = artefacts(bench.path)
    bench.run("decoder.train.steps=2")
    assert bench.ran() == ["decoder"]
    assert artefacts(bench.path)["tokenizer"] == first["tokenizer"]
    assert artefacts(bench.path)["decoder"] != first["decoder"]
    assert (bench.path / "decoder-2" / "run.json").is_file()
    bench.run()
    assert (bench.ran(), artefacts(bench.path)) == ([], first)
    bench.run("tokenizer.train.seed=1")
    assert bench.ran() == ["tokenizer", "decoder"]


def test_workers_of_other_pipelines_are_taken(bench: Bench) -> None:
    """Another pipeline beside it has the tokenizer already."""
    other = bench.path.with_name("other")
    lines: list[str] = []
    run_pipeline(bench.source, [f"run.dir={other}", "decoder.train.steps=2"], note=lines.append)
    assert f"skipped: finished, hash {artefacts(bench.path)['tokenizer'][:8]}" in lines[0]
    assert read_record(other / "pipeline.json")["stages"]["tokenizer"]["dir"] == "../two/tokenizer"
    stack = (other / "decoder" / "stack.yaml").read_text()
    assert f"from: {bench.path / 'tokenizer'}" in stack


def test_a_run_of_vtp_train_is_taken(fresh: Bench) -> None:
    run = train(load_stack(fresh.source.with_name("small.yaml"), [*MUTE, "run.dir=runs/mine"])).path
    train(load_stack(fresh.source.with_name("small.yaml"), [*MUTE, "run.dir=runs/z", "train.seed=1"]))
    fresh.run()
    assert fresh.ran() == ["decoder"]
    assert fresh.lines[0].endswith(str(fresh.path.parent / run.name))
    fresh.run("tokenizer.train.steps=5")
    assert fresh.ran() == ["tokenizer", "decoder"]


def test_a_changed_run_of_vtp_train_is_not_taken(fresh: Bench) -> None:
    run = train(load_stack(fresh.source.with_name("small.yaml"), [*MUTE, "run.dir=runs/mine"])).path
    text = (run / "stack.yaml").read_text()
    (run / "stack.yaml").write_text(text.replace("steps: 6", "steps: 7"))
    fresh.run("tokenizer.train.steps=7")
    assert fresh.ran() == ["tokenizer", "decoder"]


def test_without_a_directory_the_same_command_goes_on_in_the_same_one(fresh: Bench) -> None:
    lines: list[str] = []
    one = run_pipeline(fresh.source, note=lines.append).path
    assert one.parent == Path("runs")
    assert one.name.split("-", 3)[3].startswith("two-")
    assert run_pipeline(fresh.source, note=lines.append).path == one
    assert run_pipeline(fresh.source, ["decoder.train.steps=2"], note=lines.append).path != one
    assert sum("skipped" in line for line in lines) == 3


def test_the_written_pipeline_is_the_same_pipeline(bench: Bench) -> None:
    again = load_pipeline(bench.path)
    assert again.digest == load_pipeline(bench.source).digest
    assert again.yaml() == (bench.path / "pipeline.yaml").read_text()


# ---- artefacts that are not what they were


def test_a_deleted_artefact_is_made_again_and_what_follows_stays(bench: Bench) -> None:
    before = artefacts(bench.path)
    shutil.rmtree(bench.path / "tokenizer")
    bench.run()
    assert f"stage tokenizer: not taken: {bench.path / 'tokenizer'} is gone" in bench.lines
    assert bench.ran() == ["tokenizer"]  # bit by bit the same, so nothing that depends on it is run
    assert artefacts(bench.path) == before


def test_a_tampered_artefact_is_noticed(bench: Bench) -> None:
    before = artefacts(bench.path)
    part = bench.path / "decoder" / "checkpoints" / "step-00000004" / "tokenizer.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(bytes(data))
    bench.run()
    assert bench.ran() == ["decoder"]
    assert "another sha256 than its manifest says" in "".join(bench.lines)
    assert (artefacts(bench.path), (bench.path / "decoder-2").is_dir()) == (before, True)


def test_another_artefact_in_its_place_is_noticed(bench: Bench) -> None:
    """Well-formed, of the same stack, but not the one that was recorded."""
    record = read_record(bench.path / "pipeline.json")
    record["stages"]["tokenizer"]["artefact"] = "0" * 64
    (bench.path / "pipeline.json").write_text(json.dumps(record))
    bench.run()
    assert "has another hash than when it was finished" in bench.lines[0]
    assert bench.ran() == ["tokenizer"]


def test_a_changed_stack_of_a_stage_is_noticed(bench: Bench) -> None:
    file = bench.path / "decoder" / "stack.yaml"
    file.write_text(file.read_text().replace("steps: 4", "steps: 5"))
    bench.run()
    assert "stack.yaml was changed since" in "".join(bench.lines)
    assert bench.ran() == ["decoder"]


def test_a_broken_record_is_a_fault(bench: Bench) -> None:
    (bench.path / "pipeline.json").write_text('{"format": 1, "stages": {"tokenizer": {}}, "earlier": []}')
    with pytest.raises(DataFault, match=r"pipeline\.json is no record of format 1"):
        bench.run()


# ---- how it stops and goes on


@pytest.mark.parametrize(("way", "code"), [("stop", 75), ("interrupt", 130)])
def test_a_signal_stops_it_and_resume_continues(way: str, code: int, fresh: Bench, finished: Path) -> None:
    registry = Registry([PLUGIN])
    where = [f"run.dir={fresh.path}"]
    hook = f"decoder.hooks={{hook: {{event: step, way: {way}, at: 3}}}}"
    with pytest.raises(Preempted) as ended:
        run_pipeline(fresh.source, [*where, hook], registry, note=fresh.lines.append)
    assert ended.value.code == code
    step = "stage decoder: stopped at step 3; step 3 is saved"
    assert str(ended.value) == f"{step}; continue with: vtp resume {fresh.path} --plugin {PLUGIN}"
    record = read_record(fresh.path / "pipeline.json")
    assert (record["status"], record["stages"]["decoder"]["status"]) == ("preempted", "preempted")
    with pytest.raises(Preempted, match="stopped at step 4"):  # the hook fires again
        resume_pipeline(fresh.path, registry, note=fresh.lines.append)
    resume_pipeline(fresh.path, registry, note=fresh.lines.append)
    assert artefacts(fresh.path) == artefacts(finished)


def test_a_pipeline_resumes_bit_for_bit_after_sigkill(fresh: Bench, finished: Path) -> None:
    plugin = fresh.source.with_name("killer.py")
    plugin.write_text(KILLER, encoding="utf-8")
    signs = fresh.source.parent
    hooks = [
        f"{stage}.hooks={{killer: {{at: {at}, signs: {signs}}}}}"
        for stage, at in (("tokenizer", 5), ("decoder", 2))
    ]
    code = (
        "import sys; from vtp_core.pipeline import running as r; from vtp_plugins.registry import Registry\n"
    )
    start = code + "r.run_pipeline(sys.argv[2], sys.argv[3:], Registry([sys.argv[1]]))"
    resume = code + "from pathlib import Path; r.resume_pipeline(Path(sys.argv[2]), Registry([sys.argv[1]]))"

    def command(text: str, *arguments: str) -> int:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", text, str(plugin), *arguments], env=environment, check=False
        ).returncode

    assert command(start, str(fresh.source), f"run.dir={fresh.path}", *hooks) == -signal.SIGKILL
    assert artefacts(fresh.path) == {"tokenizer": None}
    assert command(resume, str(fresh.path)) == -signal.SIGKILL
    assert artefacts(fresh.path)["decoder"] is None
    assert command(resume, str(fresh.path)) == 0
    assert artefacts(fresh.path) == artefacts(finished)
    assert not (fresh.path / "tokenizer-2").exists()


def test_a_failing_stage_says_how_to_go_on(fresh: Bench) -> None:
    registry = Registry([PLUGIN])
    change = "decoder.objectives.fails={way: lookup, at: 2}"
    with pytest.raises(PluginFault) as failed:
        run_pipeline(fresh.source, [f"run.dir={fresh.path}", change], registry, note=fresh.lines.append)
    assert str(failed.value).startswith("stage decoder: objectives.fails")
    assert failed.value.__notes__ == [f"continue with: vtp resume {fresh.path} --plugin {PLUGIN}"]
    assert read_record(fresh.path / "pipeline.json")["stages"]["decoder"]["status"] == "failed"


def test_a_stage_that_is_not_finite_says_to_change_it(fresh: Bench) -> None:
    with pytest.raises(NonFinite) as failed:
        fresh.run("tokenizer.objectives.reconstruction.weight=1.0e38", "tokenizer.train.optim.lr=1.0e30")
    assert f"vtp run {fresh.path} run.dir={fresh.path} tokenizer.key=value" in failed.value.__notes__[0]


def test_two_processes_cannot_have_one_pipeline(bench: Bench) -> None:
    with PipelineDirectory.open(bench.path), pytest.raises(StackFault, match="is in use by"):
        bench.run()
    with PipelineDirectory.open(bench.path), pytest.raises(StackFault, match="is in use by"):
        resume_pipeline(bench.path)
    bench.run()


def test_a_directory_of_something_else_is_refused(fresh: Bench, finished: Path) -> None:
    shutil.copytree(finished / "tokenizer", fresh.path)
    with pytest.raises(StackFault, match=r"is not empty .*choose another run\.dir"):
        fresh.run()
    with pytest.raises(DataFault, match="is no pipeline directory"):
        resume_pipeline(fresh.path)


# ---- what is checked before anything runs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {a: {stack: small.yaml}, b: {stack: decoder.yaml, tokenizer: aa}}", "stages.b.tokenizer: there is no stage 'aa'; did you mean 'a'?"),
        ("stages: {b: {stack: decoder.yaml, tokenizer: a}, a: {stack: small.yaml}}", "stages.b.tokenizer: 'a' is no earlier stage"),
        ("stages: {a: {stack: small.yaml}, b: {stack: decoder.yaml, data: a}}", "stages.b.data: 'a' is no stage of latents"),
        ("stages: {a: {stack: small.yaml}, b: {latents: {}}}", "stages.b: latents are written with a tokenizer: STAGE"),
        ("stages: {a: {stack: small.yaml, tokeniser: b}}", "stages.a.tokeniser: unknown key; did you mean 'tokenizer'?"),
        ("stages: {a: {}}", "stages.a: one of stack: NAME and latents: {} is wanted"),
        ("stages: {run: {stack: small.yaml}}", "stages.run: no name of a stage"),
        ("stages: {a: 3}", "stages.a: a mapping is wanted"),
        ("stages: {}", "stages: a mapping of stages is wanted"),
        ("stage: {a: {}}", "unknown key 'stage' in the pipeline; did you mean 'stages'?"),
        ("encoder: {use: vit}", "is a stack, not a pipeline; vtp train"),
        ("stages: {a: {stack: small.yaml}, b: {stack: decoder.yaml, tokenizer: a, with: {train.stepz: 3}}}", "stage b: train.stepz: unknown key; did you mean 'steps'?"),
        ("stages: {a: {stack: small.yaml, with: {objectives.koleo.eps2: 1}}}", "stage a: objectives.koleo"),
        ("stages: {a: {stack: nothing-such}}", "stage a: stack: no stacks 'nothing-such' is installed"),
        ("stages: {a: {stack: small.yaml}, b: {stack: decoder.yaml, tokenizer: a, with: {tokenizer.from: x}}}", "stage b: tokenizer.from beside tokenizer: a; leave one out"),
        ("stages: {a: {stack: small.yaml}, b: {latents: {fliip: true}, tokenizer: a}}", "stage b: latents: unknown key 'fliip'; did you mean 'flip'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_runs(text: str, words: str, fresh: Bench) -> None:
    with pytest.raises(StackFault) as told:
        fresh.run(source=write(fresh.source.parent, text))
    assert words in str(told.value)
    assert not fresh.path.parent.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decodr.train.steps=3", "there is no stage 'decodr'; did you mean 'decoder'?"),
        ("train=3", "write stage.key=value"),
        ("decoder.train.stepz=3", "stage decoder: train.stepz: unknown key; did you mean 'steps'?"),
        ("~decoder.probes.knn", "stage decoder: override '~probes.knn'"),
        ("decoder.run.dir=x", "stages live in the pipeline's directory"),
        ("run.path=x", "run: unknown key 'path'"),
    ],
)
def test_overrides_are_checked(override: str, words: str, fresh: Bench) -> None:
    with pytest.raises(StackFault) as told:
        run_pipeline(fresh.source, [override])
    assert words in str(told.value)
    assert not fresh.path.parent.exists()


def test_a_stack_may_be_written_out(fresh: Bench) -> None:
    text = "stages: {a: {stack: {encoder: {use: vit, image_size: 32}, data: {use: emoji}}, name: mine}}"
    pipeline = load_pipeline(write(fresh.source.parent, text))
    assert [stage.title for stage in pipeline.stages] == ["mine"]


def test_several_processes_are_refused(fresh: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StackFault, match="a pipeline is run by one process"):
        fresh.run()
