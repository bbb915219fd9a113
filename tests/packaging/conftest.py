"""Wheels of every distribution, an environment with them, and distributions written by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distributions import PIP, Outside, distributions, make_outside


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel by the distribution's name."""
    out = tmp_path_factory.mktemp("wheels")
    found = distributions()
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*PIP, "wheel", *options, "-w", str(out), *(str(d.folder) for d in found)], check=True)
    return {d.name: next(out.glob(f"{d.stem}-*.whl")) for d in found}


@pytest.fixture(scope="session")
def outside(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """The wheels, installed; nobody installs anything else there."""
    return make_outside(tmp_path_factory.mktemp("outside") / "venv", wheels)


@pytest.fixture
def outside_of_my_own(wheels: dict[str, Path], tmp_path: Path) -> Outside:
    """The wheels, installed, for one test that installs more."""
    return make_outside(tmp_path / "venv", wheels)


@pytest.fixture
def install_by_hand(tmp_path: Path) -> Callable[[str, dict[str, dict[str, str]], str], Path]:
    """Write an installed distribution, a module and a dist-info folder, into a directory for PYTHONPATH."""
    folder = tmp_path / "installed"

    def install(name: str, entry_points: dict[str, dict[str, str]], source: str) -> Path:
        stem = name.replace("-", "_")
        info = folder / f"{stem}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{stem}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = []
        for group, points in entry_points.items():
            lines += [f"[vtp_plugins.{group}]", *(f"{point} = {target}" for point, target in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        return folder

    return install


@pytest.fixture
def vtp(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``vtp`` of this environment, with a directory of extra distributions."""

    def run(*arguments: str, extra: Path | None = None) -> subprocess.CompletedProcess[str]:
        before = os.environ.get("PYTHONPATH")
        path = os.pathsep.join(str(part) for part in (extra, before) if part)
        return subprocess.run(
            [sys.executable, "-m", "vtp_core", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            capture_output=True,
        )

    return run
