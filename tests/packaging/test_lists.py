"""Lists that name every plugin cannot go stale."""

from __future__ import annotations

import re

import pytest

from distributions import PYPROJECT, ROOT, Distribution, distributions

FOLDERS = {distribution.folder.name for distribution in distributions()[1:]}
plugins = pytest.mark.parametrize("distribution", distributions()[1:], ids=lambda d: d.name)


def test_requirements_name_every_plugin() -> None:
    lines = (ROOT / "plugins" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    named = [line.removeprefix("-e plugins/") for line in lines if line.startswith("-e ")]
    assert named == sorted(FOLDERS)


def test_import_linter_names_every_plugin() -> None:
    linter = PYPROJECT["tool"]["importlinter"]
    packages = {f"vtp_{folder}" for folder in FOLDERS}
    assert set(linter["root_packages"]) == packages | {"vtp_core", "vtp_plugins"}
    top, *below = linter["contracts"][0]["layers"]
    assert set(top.split(" | ")) == packages
    assert below == ["vtp_core", "vtp_plugins"]


def test_mypy_sees_every_plugin() -> None:
    prefix = "$MYPY_CONFIG_FILE_DIR/plugins/"
    paths = [
        path.removeprefix(prefix)
        for path in PYPROJECT["tool"]["mypy"]["mypy_path"]
        if path.startswith(prefix)
    ]
    assert paths == sorted(FOLDERS)


def test_no_folder_of_plugins_lacks_a_pyproject() -> None:
    there = {
        path.name for path in (ROOT / "plugins").iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    assert there == FOLDERS


def test_folders_are_not_packages() -> None:
    assert not (ROOT / "core" / "__init__.py").exists()
    assert not (ROOT / "plugins" / "__init__.py").exists()


def test_every_stack_has_an_entry_point() -> None:
    stacks = next(d for d in distributions() if d.name == "vtp-stacks")
    named = stacks.entry_points["vtp_plugins.stacks"]
    assert set(named) == {file.stem for file in stacks.packages[0].glob("*.yaml")}
    assert set(named.values()) == {"vtp_stacks"}


def test_the_page_of_the_stacks_names_every_stack() -> None:
    stacks = next(d for d in distributions() if d.name == "vtp-stacks")
    page = (stacks.folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`([a-z-]+)`", page)) >= set(stacks.entry_points["vtp_plugins.stacks"])


@plugins
def test_a_plugin_is_what_its_folder_says(distribution: Distribution) -> None:
    folder = distribution.folder
    assert distribution.name == f"vtp-{folder.name}"
    assert (folder / "README.md").read_text(encoding="utf-8").strip()
    targets = [target for points in distribution.entry_points.values() for target in points.values()]
    assert targets
    assert {re.split(r"[.:]", target)[0] for target in targets} == {f"vtp_{folder.name}"}


@plugins
def test_the_readme_names_every_plugin(distribution: Distribution) -> None:
    assert f"`{distribution.name}`" in (ROOT / "README.md").read_text(encoding="utf-8")
