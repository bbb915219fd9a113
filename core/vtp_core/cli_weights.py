"""``vtp weights``: the verbs of the registry of outside weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The registry of outside weights; nothing downloads by itself.")


@app.command("list")
def weights_list() -> None:
    """List outside weights: what for, licence, size, whether they are here."""
    from vtp_core import weights

    for row in weights.listing():
        size = f"{row.entry.size / 1e6:.1f} MB"
        typer.echo(f"{row.name:14} {row.state:8} {size:>9}  {row.entry.licence:14} {row.entry.about}")


@app.command("import")
def weights_import(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    source: Annotated[
        Path | None, typer.Option("--from", help="The file, when its package is not installed.")
    ] = None,
) -> None:
    """Convert weights from an installed package or a file, once, to a checked safetensors file."""
    from vtp_core import weights

    for name in names:
        typer.echo(weights.import_(name, source))


@app.command("verify")
def weights_verify(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None) -> None:
    """Check the sha256 of imported weights."""
    from vtp_core import weights
    from vtp_core.errors import DataFault

    states = weights.verify(name)
    for one, state in states.items():
        typer.echo(f"{one:14} {state}")
    broken = [one for one, state in states.items() if state == "broken" or (name and state != "ready")]
    if broken:
        raise DataFault(f"weights {', '.join(broken)} are not as they should be. {weights.remedy(broken[0])}")


@app.command("path")
def weights_path(name: str) -> None:
    """Print where imported weights lie."""
    from vtp_core import weights

    typer.echo(weights.path(name))
