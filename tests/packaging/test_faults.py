"""Somebody else's broken, doubled or misspelt plugin: told by name, and nobody but its users suffers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[[str, dict[str, dict[str, str]], str], Path]
Vtp = Callable[..., subprocess.CompletedProcess[str]]

STACK = """
modality: image
size: tiny
data: {use: emoji, batch_size: 8}
encoder: {use: vit, patch: 8, image_size: 64}
bottleneck: {use: linear, channels: 16}
decoder: {use: vit_pixels}
objectives: {OBJECTIVES}
train: {steps: 5}
"""
RECONSTRUCTION = "{reconstruction: {lpips: 0.0}}"


@pytest.fixture
def stack(tmp_path: Path) -> Callable[[str], str]:
    """Write a stack with these objectives and return its path."""

    def write(objectives: str) -> str:
        path = tmp_path / "stack.yaml"
        path.write_text(STACK.replace("{OBJECTIVES}", objectives))
        return str(path)

    return write


def test_a_plugin_that_raises_on_import_breaks_its_users(
    stack: Callable[[str], str], install_by_hand: Install, vtp: Vtp
) -> None:
    extra = install_by_hand(
        "acme-broken", {"objectives": {"broken": "acme_broken:Broken"}}, "import no_such_thing\n"
    )
    planned = vtp("plan", stack("{broken: {}}"), extra=extra)
    assert planned.returncode == 3, planned.stderr
    for word in ("broken", "acme-broken", "no_such_thing"):
        assert word in planned.stderr
    assert "Traceback" not in planned.stderr


def test_a_plugin_that_raises_on_import_breaks_nobody_else(
    stack: Callable[[str], str], install_by_hand: Install, vtp: Vtp
) -> None:
    points = {"objectives": {"broken": "acme_broken:Broken"}, "hooks": {"spoilt": "acme_broken:Hook"}}
    extra = install_by_hand("acme-broken", points, "raise SystemExit('no licence found')\n")
    listed = vtp("list", extra=extra)
    assert listed.returncode == 0, listed.stderr
    assert "acme-broken" in listed.stdout
    planned = vtp("plan", stack(RECONSTRUCTION), extra=extra)
    assert planned.returncode == 0, planned.stderr


def test_an_entry_point_without_its_class_is_told(
    stack: Callable[[str], str], install_by_hand: Install, vtp: Vtp
) -> None:
    extra = install_by_hand("acme-empty", {"objectives": {"empty": "acme_empty:Missing"}}, "")
    planned = vtp("plan", stack("{empty: {}}"), extra=extra)
    assert planned.returncode == 3, planned.stderr
    assert "acme-empty" in planned.stderr
    assert "Missing" in planned.stderr


def test_two_distributions_with_one_name_are_an_error_that_names_both(
    stack: Callable[[str], str], install_by_hand: Install, vtp: Vtp
) -> None:
    install_by_hand("acme-one", {"objectives": {"twice": "acme_one:Loss"}}, "")
    extra = install_by_hand("acme-two", {"objectives": {"twice": "acme_two:Loss"}}, "")
    planned = vtp("plan", stack("{twice: {}}"), extra=extra)
    assert planned.returncode == 3, planned.stderr
    for word in ("twice", "acme-one", "acme-two", "uninstall"):
        assert word in planned.stderr
    assert vtp("plan", stack(RECONSTRUCTION), extra=extra).returncode == 0
    listed = vtp("list", "objectives", extra=extra)
    assert listed.returncode == 0, listed.stderr
    assert "acme-one" in listed.stdout
    assert "acme-two" in listed.stdout


def test_a_distribution_cannot_quietly_replace_a_first_party_name(
    stack: Callable[[str], str], install_by_hand: Install, vtp: Vtp
) -> None:
    extra = install_by_hand("acme-koleo", {"objectives": {"koleo": "acme_koleo:KoLeo"}}, "")
    planned = vtp("plan", stack("{koleo: {}}"), extra=extra)
    assert planned.returncode == 3, planned.stderr
    assert "acme-koleo" in planned.stderr
    assert "vtp-koleo" in planned.stderr


@pytest.mark.parametrize(
    ("objectives", "overrides", "wanted"),
    [
        ("{kolio: {}}", [], "koleo"),
        (RECONSTRUCTION, ["encoder.use=vitt"], "vit"),
        (RECONSTRUCTION, ["trian.steps=5"], "train"),
        (RECONSTRUCTION, ["train.stepz=5"], "steps"),
        (RECONSTRUCTION, ["objectives.reconstruction.wieght=1"], "weight"),
        (RECONSTRUCTION, ["objectives.reconstruction.lpisp=1"], "lpips"),
    ],
)
def test_a_misspelt_name_is_told_with_the_right_one(
    stack: Callable[[str], str], vtp: Vtp, objectives: str, overrides: list[str], wanted: str
) -> None:
    planned = vtp("plan", stack(objectives), *overrides)
    assert planned.returncode == 2, planned.stderr
    assert f"{wanted}'" in planned.stderr
    assert "Traceback" not in planned.stderr


def test_a_misspelt_name_is_told_before_torch_is_imported(stack: Callable[[str], str], vtp: Vtp) -> None:
    # Well under torch's own import, however busy the machine: the best of three.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert vtp("plan", stack("{kolio: {}}")).returncode == 2
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2


def test_a_stack_that_is_not_there_is_told(vtp: Vtp) -> None:
    planned = vtp("plan", "vtp-tinny")
    assert planned.returncode == 2, planned.stderr
    assert "vtp-tiny" in planned.stderr


def test_a_config_cannot_import_what_it_names(stack: Callable[[str], str], vtp: Vtp) -> None:
    planned = vtp("plan", stack(RECONSTRUCTION), "encoder.use=os:system")
    assert planned.returncode == 2, planned.stderr
    assert "os:system" in planned.stderr


def test_a_single_file_plugin_is_named_on_the_command_line(
    tmp_path: Path, stack: Callable[[str], str], vtp: Vtp
) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('half-written')\n")
    planned = vtp("plan", stack(RECONSTRUCTION), "--plugin", "broken.py")
    assert planned.returncode == 3, planned.stderr
    assert "broken.py" in planned.stderr
    assert "half-written" in planned.stderr
