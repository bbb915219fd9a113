"""Arguments that several verbs of ``vtp`` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

StackName = Annotated[str, typer.Argument(metavar="STACK", help="A shipped stack's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides; key=null or ~key removes an entry."),
]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file with PLUGINS = {...}; its code is run.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def registry_of(plugins: list[Path] | None = None) -> Any:
    """What is installed, and the files of the command line."""
    from vtp_plugins.registry import Registry

    return Registry(plugins or ())
