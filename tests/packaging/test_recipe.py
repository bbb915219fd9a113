"""CONTRIBUTING's recipe for a new objective, followed to the letter in an environment of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from distributions import ROOT, Outside

PIP = "--no-build-isolation --no-deps --no-index --quiet"
SMALL = "data.batch_size=8 data.workers=0 run.dir=run"


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"CONTRIBUTING.md has no section {title!r}"
    return found.group(1)


def block(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block"
    return found.group(1)


def commands(text: str) -> list[str]:
    lines = block("console", text).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of the repository as the recipe touches."""
    copy = tmp_path / "checkout"
    template = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "plugins" / "koleo", copy / "plugins" / "koleo", ignore=template)
    return copy


def test_the_recipe_makes_an_objective_that_trains(checkout: Path, outside_of_my_own: Outside) -> None:
    recipe = section("Add an objective")
    (checkout / "mine.yaml").write_text(block("yaml", recipe), encoding="utf-8")
    ran = commands(recipe)
    for command in ran:
        done = outside_of_my_own.run("bash", "-c", adapted(command, outside_of_my_own), cwd=checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    verbs = [command.split()[1] for command in ran if command.startswith("vtp ")]
    assert verbs == ["show", "plan", "train"]
    rows = [json.loads(line) for line in (checkout / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all("mine/spread" in row for row in rows)


def adapted(command: str, outside: Outside) -> str:
    """The page's command with what a test adds: nothing from the network, a small batch, a known folder."""
    command = command.partition("#")[0].strip()
    if command.startswith("pip install "):
        return f"{outside.python} -m {command} {PIP}"
    if command.startswith("vtp train "):
        return f"{command} {SMALL}"
    return command
