"""The distributions of this repository as their pyprojects tell, and an environment far from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIP = [sys.executable, "-m", "pip"]
ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject."""

    folder: Path
    project: dict[str, Any]

    @property
    def name(self) -> str:
        """The name that people install."""
        return str(self.project["name"])

    @property
    def stem(self) -> str:
        """The name as file names write it."""
        return self.name.replace("-", "_")

    @property
    def packages(self) -> list[Path]:
        """Folders that the wheel holds at top level."""
        if self.folder == ROOT:
            return [ROOT / "vtp_plugins", ROOT / "core" / "vtp_core"]
        return [self.folder / self.stem]

    @property
    def files(self) -> set[str]:
        """Paths that belong into the wheel, without its metadata."""
        return {
            file.relative_to(package.parent).as_posix()
            for package in self.packages
            for file in package.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }

    @property
    def entry_points(self) -> dict[str, dict[str, str]]:
        """Names and targets by group."""
        return dict(self.project.get("entry-points", {}))


def distributions() -> list[Distribution]:
    """The root and every plugin."""
    files = [ROOT / "pyproject.toml", *sorted((ROOT / "plugins").glob("*/pyproject.toml"))]
    return [
        Distribution(file.parent, tomllib.loads(file.read_text(encoding="utf-8"))["project"])
        for file in files
    ]


@dataclass(frozen=True)
class Outside:
    """A virtual environment with the wheels, in which this repository cannot be imported."""

    home: Path
    environment: dict[str, str]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.home / "bin" / "python"

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command; programs of the environment come first."""
        program = self.home / "bin" / command[0]
        full = [str(program) if program.exists() else command[0], *command[1:]]
        return subprocess.run(
            full, cwd=cwd or self.home, env=self.environment, text=True, capture_output=True
        )


def make_outside(home: Path, wheels: dict[str, Path]) -> Outside:
    """Make the environment; what the wheels depend on is borrowed from the environment of the tests."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{borrow(home / 'borrowed')}\n")
    kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    made = Outside(home, {**kept, "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"})
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run(
        [*PIP, "--python", str(made.python), "install", *options, *map(str, wheels.values())], check=True
    )
    return made


def borrow(folder: Path) -> Path:
    """Link every installed package but ours; .pth files stay behind, so nothing leads to the repository."""
    folder.mkdir()
    for place in map(Path, sys.path):
        if place.name not in {"site-packages", "dist-packages"}:
            continue
        for package in place.iterdir():
            ours = package.name.lower().lstrip("_").startswith(("vtp_", "editable_impl_vtp"))
            link = folder / package.name
            if not ours and package.suffix != ".pth" and not link.is_symlink():
                link.symlink_to(package)
    return folder
