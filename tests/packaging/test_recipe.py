"""CONTRIBUTING's recipe for a new objective, followed to the letter in an environment of its own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from distributions import ROOT, Outside

# What the test adds to the page's commands: nothing from the network, few steps, a small batch.
PIP = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
SMALL = ["data.batch_size=8", "data.workers=0", "run.dir=run"]


def section(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"CONTRIBUTING.md has no section {title!r}"
    return found.group(1)


def block(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"no {language} block"
    return found.group(1)


def commands(text: str) -> list[list[str]]:
    lines = block("console", text).splitlines()
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of the repository as the recipe touches."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "plugins" / "koleo", copy / "plugins" / "koleo", ignore=shutil.ignore_patterns("__pycache__")
    )
    return copy


def test_the_recipe_makes_an_objective_that_trains(checkout: Path, outside: Outside) -> None:
    recipe = section("Add an objective")
    (checkout / "mine.yaml").write_text(block("yaml", recipe), encoding="utf-8")
    ran = commands(recipe)
    for command in ran:
        done = outside.run(*_adapted(command, outside), cwd=checkout)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert [command[:2] for command in ran if command[0] == "vtp"] == [
        ["vtp", verb] for verb in ("show", "plan", "train")
    ]
    rows = [json.loads(line) for line in (checkout / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][-1] - rows[0]["step"] == 4
    assert all(any(key.startswith("mine/") for key in row) for row in rows)


def _adapted(command: list[str], outside: Outside) -> list[str]:
    if command[:2] == ["pip", "install"]:
        return [str(outside.python), "-m", *command, *PIP]
    if command[:2] == ["vtp", "train"]:
        return [*command, *SMALL]
    return command
