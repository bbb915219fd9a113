"""Pipelines that are stopped in the middle of a stage: by signals, by death, by faults; and how they go on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_toys import STAGES, Bench

from vtp_core.errors import NonFinite, StackFault
from vtp_core.pipeline.directory import read_record
from vtp_core.stopping import Preempted

COMMAND = """
import os, signal, sys
from vtp_core.pipeline.running import run_pipeline
from vtp_plugins.registry import Registry
def note(line):
    print(line, flush=True)
    if "latents-00001" in line and sys.argv[1] == "latents":
        os.kill(os.getpid(), signal.SIGKILL)
run_pipeline(sys.argv[3], sys.argv[4:], Registry([sys.argv[2]]), note)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Hashes of a pipeline that nobody stopped."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    bench.run()
    return bench.artefacts


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path)


def spawn(bench: Bench, where: str, *overrides: str) -> subprocess.Popen[bytes]:
    """A pipeline in a process of its own."""
    path = os.pathsep.join(filter(None, sys.path))
    arguments = [where, str(bench.plugin), str(bench.source), f"run.dir={bench.path}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_a_pipeline_resumes_bit_for_bit_after_sigkill_in_any_stage(
    bench: Bench, undisturbed: dict[str, str | None]
) -> None:
    hooks = [
        f"{stage}.hooks={{signal: {{at: 2, sign: {bench.folder / stage}.sign}}}}" for stage in STAGES[::3]
    ]
    for stage, kept in (("tokenizer", 0), ("latents", 2), ("generator", 4)):
        with spawn(bench, stage, *hooks) as process:
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert bench.artefacts[stage] is None
        assert read_record(bench.path / "pipeline.json")["stages"][stage]["status"] == "running"
        assert len(list((bench.path / "latents").glob("latents-0*"))) == kept
    bench.resume()
    assert bench.ran == ["generator"]
    assert bench.lines[3] == f"stage 4/4 generator: generator, resumed, {bench.path / 'generator'}"
    assert bench.artefacts == undisturbed


@pytest.mark.slow
def test_a_pipeline_killed_at_random_moments_ends_the_same(
    bench: Bench, undisturbed: dict[str, str | None]
) -> None:
    dice, code = random.Random(0), -signal.SIGKILL
    while code == -signal.SIGKILL:
        with spawn(bench, "anywhere") as process:
            assert process.stdout is not None
            process.stdout.readline()  # imports take longer than some stages
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=dice.uniform(0, 6))
            process.kill()
            code = process.wait()
    assert (code, bench.artefacts) == (0, undisturbed)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_in_training_stops_it_and_resume_continues(
    number: str, code: int, bench: Bench, undisturbed: dict[str, str | None]
) -> None:
    sign = bench.folder / "sign"
    with pytest.raises(Preempted) as ended:
        bench.run(f"decoder.hooks={{signal: {{at: 2, number: {number}, sign: {sign}}}}}")
    assert ended.value.code == code
    resume = f"continue with: vtp resume {bench.path} --plugin {bench.plugin}"
    assert str(ended.value) == f"stage decoder: stopped at step 2; step 2 is saved; {resume}"
    record = read_record(bench.path / "pipeline.json")
    assert (record["status"], record["stages"]["decoder"]["status"]) == ("preempted", "preempted")
    bench.resume()
    assert (bench.ran, bench.artefacts) == (STAGES[1:], undisturbed)


def test_a_signal_between_shards_keeps_them(bench: Bench, undisturbed: dict[str, str | None]) -> None:
    def note(line: str) -> None:
        if "latents-00001" in line:
            signal.raise_signal(signal.SIGTERM)

    bench.note = note  # type: ignore[method-assign]
    with pytest.raises(Preempted) as ended:
        bench.run()
    del bench.note
    assert (ended.value.code, bench.artefacts["latents"]) == (75, None)
    resume = f"continue with: vtp resume {bench.path} --plugin {bench.plugin}"
    assert str(ended.value) == f"stage latents: ended by SIGTERM; {resume}"
    bench.resume()
    assert any("2 of 4 shards are there already" in line for line in bench.lines)
    assert (bench.ran, bench.artefacts) == (["latents", "generator"], undisturbed)


def test_a_failing_stage_says_how_to_go_on(bench: Bench) -> None:
    with pytest.raises(NonFinite) as failed:
        bench.run("tokenizer.objectives.sick={at: 2}")
    assert str(failed.value).startswith("stage tokenizer: ")
    assert failed.value.__notes__ == [
        "as it is, a resumed pipeline would repeat it; change the stage: "
        f"vtp run {bench.path} run.dir={bench.path} tokenizer.key=value"
    ]
    assert read_record(bench.path / "pipeline.json")["stages"]["tokenizer"]["status"] == "failed"
    bench.run("tokenizer.objectives.sick=null", source=bench.path)
    assert bench.ran == STAGES


def test_weights_that_do_not_fit_name_the_stage(bench: Bench) -> None:
    with pytest.raises(StackFault) as failed:
        bench.run("decoder.encoder={use: vit, patch: 4, image_size: 8, width: 8, depth: 1, heads: 1}")
    assert str(failed.value).startswith("stage decoder: ")
    assert failed.value.__notes__ == [f"continue with: vtp resume {bench.path} --plugin {bench.plugin}"]
