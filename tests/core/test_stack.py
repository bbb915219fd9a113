"""Loading, overriding and checking a stack, none of which imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vtp_core import options
from vtp_core.errors import DataFault, StackFault
from vtp_core.overrides import read
from vtp_core.pipeline.definition import read_pipeline
from vtp_core.stack import Stack, find_stack, load_run_stack, load_stack
from vtp_plugins.registry import Registry

STACK = """
data: {use: emoji, batch_size: 16}
encoder: {use: vit, patch: 8, width: 32}
bottleneck: [{use: linear, channels: 16}, {use: rms_norm}]
decoder: {use: vit_pixels}
modules: {head: {use: prototype_head}}
objectives:
  dino: {weight: 0.5, rows: 0.25, head: head, local_crops: 2}
  rebuild: {use: reconstruction, lpips: 0.0}
probes: {knn: {every: 5, pixels: 4}}
train: {steps: 1000, optim: {warmup: 7}}
"""
REGISTRY = Registry()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Stack]:
    """``load(*overrides, text=STACK)`` as the command line loads it."""

    def run(*overrides: str, text: str = STACK) -> Stack:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load_stack(path, overrides, REGISTRY)

    return run


Load = Callable[..., Stack]

# ---- where a stack comes from


def test_a_stack_is_found_by_name_or_path(load: Load, tmp_path: Path) -> None:
    assert load_stack("vtp-tiny", registry=REGISTRY).name == "vtp-tiny"
    assert load().name == "mine"
    assert load_stack(tmp_path / "mine.yaml").config["data"] == {"use": "emoji", "batch_size": 16}


def test_a_run_directory_stands_for_its_stack(tmp_path: Path) -> None:
    stack = load_stack(a_run(tmp_path), ["encoder.depth=1"], REGISTRY)
    assert (stack.name, stack.config["encoder"]["depth"]) == ("first", 1)
    a_run(tmp_path, STACK.replace("use: emoji", "use: webdataset, path: 'http://***/x.tar'"))
    with pytest.raises(StackFault, match="masked secret"):
        load_stack(tmp_path, registry=REGISTRY)


def test_a_folder_without_a_stack_hides_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vtp-tiny").mkdir()
    assert load_stack("vtp-tiny", registry=REGISTRY).name == "vtp-tiny"


def test_a_stack_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StackFault, match=r"no stack file .*absent\.yaml"):
        load_stack(tmp_path / "absent.yaml", registry=REGISTRY)
    with pytest.raises(StackFault, match="did you mean 'vtp-tiny'"):
        load_stack("vtp-tinny", registry=REGISTRY)


def test_every_shipped_stack_loads(tmp_path: Path) -> None:
    """Those that start from an earlier run start from one of vtp-tiny; pipelines load with their stages."""
    (tmp_path / "stack.yaml").write_text(load_stack("vtp-tiny", registry=REGISTRY).yaml(), encoding="utf-8")
    for name in REGISTRY.names("stacks"):
        tree = read(find_stack(name, REGISTRY))
        if "stages" in tree:
            assert read_pipeline(name, (), REGISTRY).stages
            continue
        source = [] if "encoder" in tree else [f"tokenizer.from={tmp_path}"]
        assert load_stack(name, source, REGISTRY).config["objectives"]


def test_the_resolved_stack_loads_as_an_equal_one(tmp_path: Path) -> None:
    overrides = ["train.seed=${data.batch_size}", "run.dir='1e3'", "objectives.clip=null", "data.workers=0"]
    first = load_stack("vtp-tiny", overrides, REGISTRY)
    (tmp_path / "vtp-tiny.yaml").write_text(first.yaml(), encoding="utf-8")
    again = load_stack(tmp_path / "vtp-tiny.yaml", registry=REGISTRY)
    assert again == first
    assert again.config["run"] == {"dir": "1e3"}
    assert again.train.seed == 64


# ---- checks


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train=3", "train: a mapping of keys is wanted"),
        ("train.optim=3", "train.optim: a mapping"),
        ("data=3", "data: a mapping"),
        ("run=[1]", "run: a mapping"),
        ("hooks=[report]", "hooks: a mapping"),
        ("objectives.dino=1", "objectives.dino: a mapping"),
        ("objectives.dino.optim=3", "objectives.dino.optim: a mapping"),
        ("modules.head.optim.lrr=3", r"modules.head.optim.lrr: unknown key; did you mean 'lr'"),
        ("encoder=vit", "encoder: a mapping"),
        ("tokenizer=3", "tokenizer: a mapping"),
        ("bottleneck=linear", "bottleneck: a component such as"),
        ("bottleneck=[linear]", "bottleneck: a component such as"),
        ("size=huge", "size: no dial 'huge'"),
        ("size=[s]", "size: no dial"),
        ("modality=[image]", "modality: .* is no name"),
        ("~encoder.use", "encoder: 'use' is missing; known: .*vit"),
        ("encoder=null", "has no encoder"),
        ("train.steps=many", "train.steps: .*valid integer.*'many'"),
        ("train.steps=0", "train.steps: .*greater than 0"),
        ("train.seed=-1", "train.seed"),
        ("train.optim.lr=inf", "train.optim.lr: .*finite"),
        ("train.optim.betas=[0.9,1.5]", "train.optim.betas.1: .*less than 1"),
        ("train.compile=true", "train.compile: not built yet"),
        ("train.trackers=[tensorbord]", "train.trackers: .*did you mean 'tensorboard'"),
        ("objectives.dino.weight=x", "objectives.dino.weight: .*valid number.*or.*valid dictionary"),
        ("objectives.dino.weight={cls: x}", "^objectives.dino.weight.cls: .*valid number"),
        ("objectives.dino.rows=0", "objectives.dino.rows"),
        ("objectives.dino.rows=1.5", "objectives.dino.rows"),
        ("objectives.dino.start=0.5", "objectives.dino.start: a step is"),
        ("objectives.dino.start=-1", "objectives.dino.start: a step is"),
        ("objectives.dino.start='120%'", "objectives.dino.start: a step is"),
        ("objectives.dino.start=true", "objectives.dino.start: a step is"),
        ("objectives.dino={start: 10, stop: '1%'}", "it stops at 1%, before it has started at 10"),
        ("objectives.dino.balance={againts: x}", "dino.balance.againts: unknown key; did you mean 'against'"),
        ("objectives.dino.critic.optim.lrr=1", "dino.critic.optim.lrr: unknown key; did you mean 'lr'"),
        ("objectives.decoder={use: koleo}", "objectives.decoder: .* write my_decoder: {use: koleo}"),
        ("objectives.a/b={use: koleo}", "'a/b' is no name"),
        ("probes.knn.every='x%'", "probes.knn.every: a step is"),
        ("tokenizer.frozn=[encoder]", "tokenizer.frozn: unknown key; did you mean 'frozen'"),
        ("encoder.from=runs/demo", "encoder.from: .*not built yet"),
        ("encoder.frozen=often", "encoder.frozen: true or false, not 'often'"),
        ("bottleneck[0].optim={lr: 1}", "bottleneck.0.: 'optim': a chain trains as one"),
        ("objectives.dino.frozen=true", "objectives.dino: 'frozen': it has no effect here"),
        ("views.mine={use: plain, optim: {lr: 1}}", "views.mine: 'optim': it has no effect here"),
        ("generator={share: encoder}", "generator: 'use' is missing"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_by_its_key(load: Load, override: str, words: str) -> None:
    with pytest.raises(StackFault, match=words):
        load(override)


def test_a_name_of_another_kind_is_no_name(load: Load) -> None:
    with pytest.raises(StackFault, match=r"encoder\.use: no encoders 'vit_pixels' is installed"):
        load("encoder.use=vit_pixels")
    with pytest.raises(
        StackFault, match=r"objectives\.dinno: no objectives 'dinno' is installed; did you mean 'dino'"
    ):
        load("objectives.dinno={}")
    with pytest.raises(StackFault, match=r"bottleneck\[1\]\.use: .*did you mean 'rms_norm'"):
        load("bottleneck[1].use=rmsnorm")


# ---- values


def test_the_dial_sets_what_is_not_written(load: Load) -> None:
    tiny, large = load(), load("size=l")
    assert (tiny.train.optim.lr, large.train.optim.lr) == (1e-3, 5e-4)
    assert tiny.train.optim.warmup == large.train.optim.warmup == 7
    assert load("size=l", "~train.optim").train.optim.warmup == "3%"
    assert load("size=l", "train.optim.lr=2").train.optim.lr == 2


def test_steps_are_numbers_or_shares_of_the_run(load: Load) -> None:
    keys = load("train.checkpoint_every='37.5%'", "train.optim.warmup=50.0").train
    assert options.steps_of(keys.checkpoint_every, keys.steps) == 375
    assert options.steps_of(keys.optim.warmup, keys.steps) == 50


def test_a_critic_keeps_its_own_defaults_beside_what_is_written() -> None:
    critic = options.Objective.model_validate({"critic": {"optim": {"lr": 1e-4}}}).critic
    assert critic.optim.lr == 1e-4
    assert (critic.optim.betas, critic.optim.weight_decay, critic.optim.schedule) == (
        (0.5, 0.9),
        0.0,
        "constant",
    )


# ---- the stack of a run


def a_run(folder: Path, text: str = STACK, name: str | None = "first") -> Path:
    (folder / "stack.yaml").write_text(text, encoding="utf-8")
    if name:
        (folder / "run.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    return folder


def test_a_run_keeps_the_name_that_it_was_started_with(tmp_path: Path) -> None:
    assert load_run_stack(a_run(tmp_path), REGISTRY).name == "first"
    (tmp_path / "run.json").unlink()
    assert load_run_stack(tmp_path, REGISTRY, ["train.steps=3"]).name == tmp_path.name


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataFault, match="is no run directory"):
        load_run_stack(tmp_path, REGISTRY)
    (a_run(tmp_path) / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataFault, match=r"run\.json is no record of a run"):
        load_run_stack(tmp_path, REGISTRY)


def test_a_masked_secret_is_not_trained_with(tmp_path: Path) -> None:
    a_run(tmp_path, STACK.replace("use: emoji", "use: webdataset, path: 'http://***/x.tar'"))
    with pytest.raises(StackFault, match="masked secret"):
        load_run_stack(tmp_path, REGISTRY)
    assert load_run_stack(tmp_path, REGISTRY, ["data.path=y.tar"]).config["data"]["path"] == "y.tar"
    assert load_run_stack(tmp_path, REGISTRY, check=False).config["data"]["path"] == "http://***/x.tar"


def test_a_tokenizer_reads_a_run_whose_objectives_are_not_installed(tmp_path: Path) -> None:
    a_run(tmp_path, STACK.replace("rebuild: {use: reconstruction", "rebuild: {use: not_here"))
    with pytest.raises(StackFault, match="not_here"):
        load_run_stack(tmp_path, REGISTRY)
    assert "rebuild" in load_run_stack(tmp_path, REGISTRY, check=False).config["objectives"]


def test_loading_and_checking_a_stack_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom vtp_core import load_stack\n"
        "load_stack('vtp-tiny', ['train.steps=2'])\n"
        "assert not {'torch', 'numpy', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
