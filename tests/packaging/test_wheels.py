"""Every distribution builds, holds exactly what its folder holds, and works away from the repository."""

from __future__ import annotations

import email.message
import json
import zipfile
from pathlib import Path

import pytest

from distributions import ROOT, Distribution, Outside, distributions

# What a package may hold; anything else came in by accident.
SUFFIXES = {".css", ".html", ".j2", ".js", ".json", ".md", ".py", ".txt", ".typed", ".webp", ".yaml"}
LARGEST = 8 * 2**20

every = pytest.mark.parametrize("distribution", distributions(), ids=lambda d: d.name)
plugins = pytest.mark.parametrize("distribution", distributions()[1:], ids=lambda d: d.name)


def contents(wheel: Path) -> tuple[set[str], set[str]]:
    """Files of the packages, and files of the metadata below the dist-info folder."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    return names - metadata, {name.partition("/")[2] for name in metadata}


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode("utf-8"))


@every
def test_a_wheel_holds_its_packages_and_nothing_else(
    distribution: Distribution, wheels: dict[str, Path]
) -> None:
    files, metadata = contents(wheels[distribution.name])
    assert files == distribution.files
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt"} <= metadata
    assert {Path(name).suffix for name in files} <= SUFFIXES
    assert not [name for name in files if "test" in Path(name).stem and name != "vtp_plugins/testing.py"]


@every
def test_a_wheel_is_typed_and_small(distribution: Distribution, wheels: dict[str, Path]) -> None:
    files, _ = contents(wheels[distribution.name])
    for package in distribution.packages:
        assert f"{package.name}/py.typed" in files
        assert f"{package.name}/__init__.py" in files
    assert wheels[distribution.name].stat().st_size < LARGEST


@every
def test_metadata_is_complete(distribution: Distribution, wheels: dict[str, Path]) -> None:
    metadata = metadata_of(wheels[distribution.name])
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == distribution.project["license"]
    assert metadata["Summary"]
    assert len(str(metadata.get_payload())) > 100, "the README is missing"


@plugins
def test_a_plugin_depends_on_the_contract(distribution: Distribution, wheels: dict[str, Path]) -> None:
    requirements = metadata_of(wheels[distribution.name]).get_all("Requires-Dist") or []
    assert any(requirement.startswith("vtp-plugins") for requirement in requirements)


def test_the_root_wheel_carries_licence_and_notices(wheels: dict[str, Path]) -> None:
    _, metadata = contents(wheels["vtp-plugins"])
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= metadata
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_the_emoji_wheel_carries_the_pictures_and_their_notices(wheels: dict[str, Path]) -> None:
    files, metadata = contents(wheels["vtp-emoji"])
    assert sum(name.endswith(".webp") for name in files) >= 1
    wheel = zipfile.ZipFile(wheels["vtp-emoji"])
    texts = [name for name in wheel.namelist() if Path(name).name.upper().startswith(("NOTICE", "LICEN"))]
    told = "\n".join(wheel.read(name).decode("utf-8") for name in texts)
    for word in ("Noto", "Apache", "Twemoji", "CC-BY 4.0", "Fluent", "MIT"):
        assert word in told, f"the notices in vtp-emoji's wheel ({texts or sorted(metadata)}) lack {word!r}"


def test_the_wheels_work_away_from_the_repository(outside: Outside) -> None:
    probe = (
        "import sys, vtp_core, vtp_plugins as c; print(vtp_core.__file__, c.__file__, *sys.path, sep='\\n')"
    )
    found = outside.run("python", "-c", probe)
    assert found.returncode == 0, found.stderr
    assert str(ROOT) not in {line.rstrip("/") for line in found.stdout.splitlines()}
    assert all(line.startswith(str(outside.home)) for line in found.stdout.splitlines()[:2])


def test_vtp_list_works_away_from_the_repository(outside: Outside) -> None:
    shown = outside.run("vtp", "list", "--json")
    assert shown.returncode == 0, shown.stderr
    listed = {(row["kind"], row["name"]) for row in json.loads(shown.stdout)}
    declared = {
        (group.partition(".")[2], name)
        for distribution in distributions()
        for group, names in distribution.entry_points.items()
        for name in names
    }
    assert listed == declared
    assert outside.run("vtp", "list").returncode == 0
    assert "train" in outside.run("vtp", "--help").stdout


def test_every_entry_point_loads_away_from_the_repository(outside: Outside) -> None:
    probe = "from vtp_plugins.registry import Registry\nfor entry in Registry().entries(): entry.load()"
    loaded = outside.run("python", "-c", probe)
    assert loaded.returncode == 0, loaded.stderr
