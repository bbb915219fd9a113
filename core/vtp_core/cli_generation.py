"""The verbs of pipelines, latents and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vtp_core.cli_arguments import AsJson, Overrides, Plugins, RunPath, registry_of


def add(app: typer.Typer) -> None:
    """Register them, where the help lists them next."""
    for verb in (run, latents, generate, compare):
        app.command()(verb)


def run(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A shipped name, or a YAML file.")],
    overrides: Overrides = None,
    plugin: Plugins = None,
) -> None:
    """Run the stages of a pipeline that are not finished, with overrides stage.key=value."""
    from vtp_core.pipeline.running import run_pipeline

    piped(run_pipeline(pipeline, overrides or (), registry_of(plugin), say))


def latents(
    run: RunPath,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the shards.")],
    overrides: Overrides = None,
    flip: Annotated[bool, typer.Option(help="Store the mirrored images' latents too.")] = True,
    posterior: Annotated[str, typer.Option(help="mean, sample or moments, of a bottleneck that draws.")] = "mean",
    layout: Annotated[str, typer.Option(help="vtp, or lightningdit: what its own dataset reads.")] = "vtp",
    images: Annotated[bool, typer.Option("--images", help="Store the images.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Store an output of one of the stack's teachers.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples of a file, fewer if they are large.")] = 10_000,
    split: Annotated[str | None, typer.Option(help="Of the data; by default the trained one.")] = None,
    weights: Annotated[str, typer.Option(help="student or ema.")] = "student",
    plugin: Plugins = None,
) -> None:  # fmt: skip
    """Write the latents of a run's data as shards, with statistics and a manifest."""
    from vtp_core.latents.writer import write_latents

    said: Any = {
        "flip": flip, "posterior": posterior, "layout": layout, "images": images, "teacher": teacher,
        "shard_size": shard_size, "split": split, "weights": weights,
    }  # fmt: skip
    manifest = write_latents(
        run, out, overrides=overrides or (), **said, registry=registry_of(plugin),
        note=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(f"latents {manifest}")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A probe, or a pattern; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put the readings of several runs side by side; those of different protocols are refused."""
    from vtp_core.comparing import compare as compared

    found = compared(runs, only or ())
    typer.echo(json.dumps(found.data, indent=1) if as_json else str(found))


def generate(
    run: RunPath,
    overrides: Overrides = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="A label's name or number; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A caption; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many samples.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of noise and drawn labels.")] = 0,
    weights: Annotated[str | None, typer.Option("--weights", help="ema or student.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG file to write.")] = Path("grid.png"),
    plugin: Plugins = None,
) -> None:  # fmt: skip
    """Sample pictures from a run's generator into one grid, with overrides such as sampler.steps=20."""
    from vtp_core.grids import generate_grid

    asked: Any = {"n": n, "labels": label or (), "texts": text or (), "seed": seed, "weights": weights}
    typer.echo(generate_grid(run, out, **asked, overrides=overrides or (), registry=registry_of(plugin)))


def say(line: str) -> None:
    """Tell progress on stderr."""
    typer.echo(line, err=True)


def piped(directory: Any) -> None:
    """Tell where a pipeline lies."""
    typer.echo(f"pipeline {directory.path}")
