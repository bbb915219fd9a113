"""``vtp export`` and ``vtp verify``: a run in a directory that others can use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_core.cli_arguments import AsJson, Plugins, RunPath, registry_of


def add(app: typer.Typer) -> None:
    """Register them, where the help lists them next."""
    for verb in (export, verify):
        app.command()(verb)


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="native: ours; vtp: the VTP release's; diffusers: an autoencoder for it; onnx: graphs.",
        ),
    ] = "native",
    weights: Annotated[str, typer.Option(help="student or ema.")] = "student",
    statistics: Annotated[
        Path | None, typer.Option(help="A folder of vtp latents, whose statistics come along.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Write a run's tokenizer, in our layout also its generator, as a directory that others can use."""
    from vtp_core.export.writing import export as written

    for note in written(run, out, format, weights, statistics, registry_of(plugin)):
        typer.echo(note, err=True)
    typer.echo(f"export  {out}")


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A run, an export or a VTP directory.")],
    as_json: AsJson = False,
) -> None:
    """Load a directory in a clean process, encode, decode, and print what came out; ONNX by onnxruntime."""
    import json

    from vtp_core.export.verifying import verify as verified

    found = verified(path)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        typer.echo(f"{key:11} {value}")
