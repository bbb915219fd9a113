"""From a file and ``key=value`` to a tree: what merges, what is removed, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vtp_core.errors import StackFault
from vtp_core.overrides import merged, read

STACK = """
data: {use: emoji, batch_size: 16, split: 3}
encoder: {use: vit, patch: 8, width: 32}
bottleneck: [{use: linear, channels: 16}, {use: rms_norm}]
objectives:
  dino: {weight: 0.5, rows: 0.25, head: head, local_crops: 2}
  rebuild: {use: reconstruction, lpips: 0.0}
probes: {knn: {every: 5, pixels: 4}}
generator: {use: dit, depth: 3, path: {use: linear}, condition: label}
train: {steps: 1000, seed: 5, optim: {warmup: 7}}
"""
Load = Callable[..., dict[str, Any]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """``load(*overrides, text=STACK)`` gives the tree."""

    def run(*overrides: str, text: str = STACK) -> dict[str, Any]:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return merged(read(path), overrides)

    return run


# ---- values


def test_overrides_merge(load: Load) -> None:
    changes = [
        "objectives.dino.weight=2",
        "train.optim.lr=3e-4",
        "bottleneck[0].channels=8",
        "hooks.report={}",
    ]
    tree = load(*changes)
    assert tree["objectives"]["dino"] == {"weight": 2, "rows": 0.25, "head": "head", "local_crops": 2}
    assert tree["train"] == {"steps": 1000, "seed": 5, "optim": {"warmup": 7, "lr": 3e-4}}
    assert tree["bottleneck"] == [{"use": "linear", "channels": 8}, {"use": "rms_norm"}]
    assert tree["hooks"] == {"report": {}}


def test_a_component_and_a_chain_replace_each_other(load: Load) -> None:
    assert load("bottleneck={use: linear, channels: 4}")["bottleneck"] == {"use": "linear", "channels": 4}
    assert load("bottleneck=[{use: noise}]")["bottleneck"] == [{"use": "noise"}]
    assert load("bottleneck={use: noise}", "bottleneck=[{use: rms_norm}]")["bottleneck"] == [
        {"use": "rms_norm"}
    ]
    assert load("encoder={depth: 3}")["encoder"] == {"use": "vit", "patch": 8, "width": 32, "depth": 3}


def test_an_option_that_is_set_to_null_keeps_its_null(load: Load) -> None:
    assert load("encoder.layer_scale=null")["encoder"]["layer_scale"] is None


@pytest.mark.parametrize(
    "override",
    [
        "train.steps",
        "~",
        "=3",
        "",
        "train.steps=[1",
        "train.seed='a",
        "bottleneck[7].channels=8",
        "bottleneck.x=1",
    ],
)
def test_an_override_that_cannot_be_read_is_told(load: Load, override: str) -> None:
    with pytest.raises(StackFault, match=r"^override "):
        load(override)


# ---- removal


@pytest.mark.parametrize("override", ["~objectives.dino", "objectives.dino=null", "objectives.dino="])
def test_an_entry_is_removed(load: Load, override: str) -> None:
    assert list(load(override)["objectives"]) == ["rebuild"]


def test_a_section_a_key_and_a_link_are_removed(load: Load) -> None:
    tree = load("~probes", "~train.optim", "~bottleneck[1]")
    assert "probes" not in tree
    assert tree["train"] == {"steps": 1000, "seed": 5}
    assert tree["bottleneck"] == [{"use": "linear", "channels": 16}]


def test_null_in_the_file_removes_an_entry_too(load: Load) -> None:
    assert load(text=STACK + "hooks: {report: null, tensorboard: {}}\n")["hooks"] == {"tensorboard": {}}


@pytest.mark.parametrize(
    "override",
    ["~objectives.dinno", "objectives.dinno=null", "~objectives.dino.wieght", "~probs.knn", "~bottleneck[2]"],
)
def test_a_misspelt_removal_is_an_error(load: Load, override: str) -> None:
    with pytest.raises(StackFault, match="to remove"):
        load(override)


# ---- another component


def test_another_use_drops_the_options_but_keeps_the_engine_keys(load: Load) -> None:
    uses = [
        "objectives.dino.use=koleo",
        "data.use=image_folder",
        "probes.knn.use=rank_me",
        "generator.use=sit",
    ]
    tree = load(*uses, "data.root=x")
    assert tree["objectives"]["dino"] == {"weight": 0.5, "rows": 0.25, "use": "koleo"}
    assert tree["data"] == {"use": "image_folder", "batch_size": 16, "root": "x"}
    assert tree["probes"]["knn"] == {"every": 5, "use": "rank_me"}
    assert tree["generator"] == {"use": "sit", "path": {"use": "linear"}, "condition": "label"}


def test_options_of_the_new_component_may_stand_before_its_use(load: Load) -> None:
    tree = load("data.root=x", "data.use=image_folder", "bottleneck[0]={use: noise, tau: 1}")
    assert tree["data"] == {"use": "image_folder", "batch_size": 16, "root": "x"}
    assert tree["bottleneck"][0] == {"use": "noise", "tau": 1}


def test_the_same_use_again_drops_nothing(load: Load) -> None:
    assert load("objectives.dino.use=dino", "encoder={use: vit}") == {
        **load(),
        "objectives": {**load()["objectives"], "dino": {**load()["objectives"]["dino"], "use": "dino"}},
    }


def test_a_use_that_names_no_component_drops_nothing(load: Load) -> None:
    text = STACK + "sampler: {use: euler, steps: 9, guidance: {scale: 2.0, interval: [0.0, 0.9]}}\n"
    tree = load("sampler.guidance.use=auto", "train.optim={lr: 0.1}", "train.optim.use=sgd", text=text)
    assert tree["sampler"]["guidance"] == {"scale": 2.0, "interval": [0.0, 0.9], "use": "auto"}
    assert {"lr": 0.1, "use": "sgd"}.items() <= tree["train"]["optim"].items()
    tree = load("generator.path.use=vp", "sampler.use=heun", text=text)
    assert tree["generator"]["path"] == {"use": "vp"}
    assert tree["sampler"] == {"use": "heun", "guidance": {"scale": 2.0, "interval": [0.0, 0.9]}}


# ---- interpolation


def test_interpolations_read_the_stack_and_the_environment(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_STEPS", "12")
    text = STACK + 'run: {dir: "${oc.env:NOT_THERE,runs}/${train.seed}-${oc.select:train.keep,2}"}\n'
    tree = load("train.steps=${oc.env:MY_STEPS}", "train.keep=${data.batch_size}", text=text)
    assert (tree["train"]["steps"], tree["train"]["keep"], tree["run"]["dir"]) == ("12", 16, "runs/5-16")


@pytest.mark.parametrize("text", ["${oc.env:NOT_THERE_AT_ALL}", "${nowhere.to.be}", "${run.dir}", "???"])
def test_an_interpolation_that_does_not_resolve_is_told(load: Load, text: str) -> None:
    with pytest.raises(StackFault, match="stack: "):
        load(f"run.dir={text}")


@pytest.fixture
def resolver() -> Iterator[list[str]]:
    """Another library's resolver, and what it was called with."""
    called: list[str] = []
    OmegaConf.register_resolver("their_own", called.append)
    yield called
    OmegaConf.clear_resolver("their_own")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.create:1}",
        "${oc.coerce:1,os.system}",
        "${oc.decode:x}",
        "${oc.dict.keys:train}",
        "${their_own:x}",
        "${ their_own:x}",
        "a ${oc.env:HOME} ${their_own:x}",
        "${oc.env:${their_own:x}}",
        "${oc.env:NOT_THERE,${their_own:x}}",
        "${${oc.env:HOME}:x}",
    ],
)
def test_no_other_resolver_runs_and_none_is_taken_from_others(
    load: Load, resolver: list[str], text: str
) -> None:
    with pytest.raises(StackFault):
        load(text=STACK + f'run: {{dir: "{text}"}}\n')
    with pytest.raises(StackFault):
        load(f"run.dir='{text}'")
    with pytest.raises(StackFault):
        load("hooks.x=1", text=STACK + f'hooks: "{text}"\n')
    assert resolver == []
    assert OmegaConf.has_resolver("their_own")
    assert OmegaConf.has_resolver("oc.create")


# ---- what a file may not hold


@pytest.mark.parametrize(
    "text",
    [
        "x: !!python/object/apply:os.system [exit]",
        "run: {dir: !<tag:yaml.org,2002:python/object/apply:pathlib.PosixPath> [a]}",
        "%TAG ! tag:yaml.org,2002:python/\n---\nx: !object/apply:os.system [exit]",
        "x: !!binary aGVsbG8=",
    ],
)
def test_tags_are_refused(load: Load, text: str) -> None:
    with pytest.raises(StackFault, match="a stack holds plain values"):
        load(text=text)


def test_tags_are_refused_in_overrides(load: Load) -> None:
    with pytest.raises(StackFault, match="a stack holds plain values"):
        load("run.dir=!<tag:yaml.org,2002:python/object/apply:pathlib.PosixPath> [a]")


def test_an_exclamation_mark_is_no_tag(load: Load) -> None:
    assert load("run.dir='here!'")["run"] == {"dir": "here!"}


def bomb() -> bytes:
    """Nine aliases of nine aliases, and so on."""
    lines = [b"a: &a [x,x,x,x,x,x,x,x,x]"]
    for letter in range(98, 106):
        lines.append(b"%c: &%c [%s]" % (letter, letter, b",".join([b"*%c" % (letter - 1)] * 9)))
    return b"\n".join(lines)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"a: 1\n" * 300_000, "larger than 1,000,000 bytes"),
        (b"- a\n- b\n", "a stack is a mapping"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"a: [1", "flow sequence"),
        (b"train: {steps: 1, steps: 2}", "duplicate key"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "nested too deeply"),
        (b"a: &a [b, *a]", "recursive"),
        (bomb(), "limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_stack_is_told(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(raw)
    with pytest.raises(StackFault, match=words):
        read(tmp_path / "bad.yaml")


def test_a_bare_on_is_a_word(tmp_path: Path) -> None:
    """YAML 1.1 takes it for true."""
    (tmp_path / "s.yaml").write_text("objectives: {align: {on: cls}}\n")
    assert merged(read(tmp_path / "s.yaml"), [])["objectives"] == {"align": {"on": "cls"}}
    found = merged(
        read(tmp_path / "s.yaml"), ["objectives.align={on: patches, use: align}", "objectives.b.on=cls"]
    )
    assert found["objectives"] == {"align": {"on": "patches", "use": "align"}, "b": {"on": "cls"}}
