"""``vtp convert``: published weights to a directory of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtp_core.cli_arguments import Plugins, registry_of


def add(app: typer.Typer) -> None:
    """Put the verb into ``vtp``."""
    app.command()(convert)


def convert(
    name: Annotated[
        str, typer.Argument(metavar="FORMAT", help="An importer; vtp list importers shows them.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Safetensors, or .pt, .pth, .ckpt, .bin.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="What the weights don't tell, such as heads=6; with a dot, of the stack: sampler.steps=50.",
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option("--with", help="Another file of the same network; may be repeated.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="Where in FILE the weights are: ema, model.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="RUN", help="Whose tokenizer a generator gets.")
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="Mean and std, or var, of the latent: latents_stats.pt."),
    ] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="What latents are multiplied by, such as 0.18215.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="A file with one label's name a line, or imagenet.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Convert published weights to a directory that loads as a run; pickles are read without running code."""
    from vtp_core.converting.conversion import Request
    from vtp_core.converting.conversion import convert as converted

    asked = Request(
        name, file, tuple(beside or ()), key, tuple(words or ()), tokenizer, statistics, scale, labels
    )
    typer.echo(f"converted {converted(asked, out, registry_of(plugin), _say)}")


def _say(line: str) -> None:
    typer.echo(line, err=True)
