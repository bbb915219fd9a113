"""The command line in process: exit codes, messages, suggestions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small import run, write_stack


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "vtp-tiy"], 2, "did you mean 'vtp-tiny'?"),
        (["train", "vtp-tiny", "trian.steps=3"], 2, "did you mean 'train'?"),
        (["train", "vtp-tiny", "train.stpes=3"], 2, "did you mean 'steps'?"),
        (["train", "vtp-tiny", "train.optim.lrr=3"], 2, "did you mean 'lr'?"),
        (["train", "vtp-tiny", "objectives.klip.weight=1"], 2, "did you mean 'clip'?"),
        (["train", "vtp-tiny", "objectives.ibot.protoypes=64"], 2, "did you mean 'prototypes'?"),
        (["train", "vtp-tiny", "objectives.ibot.wieght=64"], 2, "did you mean 'weight'?"),
        (["train", "vtp-tiny", "data.batchsize=64"], 2, "did you mean 'batch_size'?"),
        (["train", "vtp-tiny", "train.steps=many"], 2, "train.steps"),
        (["train", "vtp-tiny", "objectives.clip.use=os.system"], 2, "os.system"),
        (["train", "vtp-tiny", "objectives.clip"], 2, "key=value"),
        (["train", "vtp-tiny", "encoder.use=vit_pixels"], 2, "encoder"),
        (["train", "vtp-tiny", "objectives.dino.rows=0.3"], 2, "data.batch_size="),
        (["list", "objektives"], 2, "did you mean 'objectives'?"),
        (["show", "dion"], 2, "did you mean 'dino'?"),
        (["train", "vtp-tiny", "--plugin", "absent.py"], 3, "absent.py"),
        (["resume", "nowhere"], 4, "nowhere"),
        (["eval", "nowhere"], 4, "nowhere"),
        (["encode", "nowhere", "x.png", "-o", "z.safetensors"], 4, "nowhere"),
    ],
)
def test_a_fault_ends_with_its_code_and_the_remedy(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, _, errors = run(capsys, *arguments)
    assert ended == code
    assert words in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 6


def test_list_names_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "list", "objectives", "--json")
    assert code == 0
    assert {"clip", "dino", "ibot", "koleo", "reconstruction"} <= {entry["name"] for entry in json.loads(out)}


def test_show_tells_options_needs_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "ibot")
    assert "student_temperature: float = 0.1" in out
    assert "patches@block" in out
    assert "vtp_ibot" in out


def test_plan_shares_one_student_and_one_teacher_pass(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "vtp-tiny", "--json")
    forwards = {row["forward"]: row for row in json.loads(out)["forwards"]}
    assert forwards["encoder(global, mask block)"]["readers"] == ["dino", "ibot", "koleo"]
    assert forwards["encoder(global, ema)"]["readers"] == ["dino", "ibot"]
    assert forwards["encoder(image)"]["readers"] == ["clip", "reconstruction"]
    assert sum(name.startswith("encoder") for name in forwards) == 4


def test_a_plan_is_a_page_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "vtp-tiny", "objectives.clip=null", "~objectives.koleo")
    assert "clip" not in out
    for word in ("stage", "parameters", "FLOPs", "memory", "synchronise", "sharing"):
        assert word in out


def test_a_single_file_plugin_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        """
from vtp_plugins import Need, Objective
from vtp_core.data.views import Plain

class Shrink(Objective):
    \"\"\"Pull features towards zero.\"\"\"
    def __init__(self, spec, *, power: float = 2.0):
        super().__init__()
        self.needs = {"x": Need("image", "cls")}
        self.views = {"image": Plain(spec)}
        self.power = power
    def forward(self, got, clock):
        return {"size": got["x"]["cls"].float().abs().pow(self.power).mean()}

PLUGINS = {"objectives": {"shrink": Shrink}}
""",
        encoding="utf-8",
    )
    stack = write_stack(tmp_path)
    extra = ["objectives.shrink.power=3", "train.steps=2", f"run.dir={tmp_path / 'run'}"]
    code, out, _ = run(capsys, "train", str(stack), "--plugin", str(plugin), *extra)
    assert code == 0
    assert str(tmp_path / "run") in out
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["shrink/size"] > 0


def test_a_yaml_cannot_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (
        "x: !!python/object/apply:os.system [true]",
        "size: ${oc.coerce:1,os.system}",
        "encoder: {_target_: os.system}",
    ):
        stack = tmp_path / "evil.yaml"
        stack.write_text(text, encoding="utf-8")
        assert run(capsys, "train", str(stack))[0] == 2
