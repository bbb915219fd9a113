"""The ``vtp`` command: verbs; everything else is ``key=value``. Heavy imports stay in the verbs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vtp_core import cli_convert, cli_export, cli_generation, farewell
from vtp_core.attribution import translated
from vtp_core.cli_arguments import AsJson, Overrides, Plugins, RunPath, StackName, registry_of
from vtp_core.cli_generation import piped, say
from vtp_core.cli_weights import app as weights_app
from vtp_core.stopping import Interrupted, handled, interrupt

_LINES, _WIDEST = 6, 600  # lines of a message, characters of a line

app = typer.Typer(
    name="vtp", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train, measure and use visual tokenizers made of plugins.",
    epilog="First run: vtp list; vtp plan vtp-tiny; vtp train vtp-tiny. --debug adds a fault's traceback.",
)  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Prepare data.")
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a fault ends with its message and exit code, the traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        with handled(interrupt):
            app(arguments, standalone_mode=True)
    except SystemExit as done:
        if _several() and not done.code:
            farewell.part()
        raise
    except Interrupted as stop:
        _end(str(stop), stop.code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        fault = translated(error)
        if fault is None:
            bug = "this is a bug of vtp-plugins; --debug tells where"
            _end(f"unexpected {type(error).__name__}: {error}\n{bug}", 1)
        else:
            _end(farewell.words(fault), fault.code, fault.lines, fault)


def _end(message: str, code: int, longest: int = _LINES, fault: Exception | None = None) -> NoReturn:
    """Say why the command ends, in a few lines: of a long message the middle is left out."""
    lines = [line if len(line) <= _WIDEST else f"{line[:_WIDEST]}..." for line in message.splitlines()]
    if len(lines) > longest:
        lines[longest - 3 : -2] = ["..."]
    typer.echo("vtp: " + "\n".join(lines), err=True)
    farewell.leave("vtp: " + "\n".join(lines), fault)
    if _several():  # connections to processes that have gone may not close in order
        os._exit(code)
    raise SystemExit(code)


def _stack(source: str, overrides: list[str] | None, plugins: list[Path] | None) -> Any:
    from vtp_core.stack import load_stack

    return load_stack(source, overrides or (), registry_of(plugins))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("vtp-plugins"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, such as objectives.")] = None,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """List what is installed; imports nothing."""
    from vtp_core.errors import StackFault, suggestion
    from vtp_plugins.registry import KINDS

    if kind is not None and kind not in KINDS:
        raise StackFault(f"no kind {kind!r}{suggestion(kind, KINDS)}")
    entries = registry_of(plugin).entries(kind)
    if as_json:
        keys = ("kind", "name", "target", "distribution")
        typer.echo(json.dumps([{key: getattr(entry, key) for key in keys} for entry in entries], indent=1))
        return
    widths = [
        max((len(getattr(e, key)) for e in entries), default=0) for key in ("kind", "name", "distribution")
    ]
    for e in entries:
        typer.echo(f"{e.kind:{widths[0]}}  {e.name:{widths[1]}}  {e.distribution:{widths[2]}}  {e.target}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An installed name, or kind/name.")], plugin: Plugins = None
) -> None:
    """Options, needs and source of one component."""
    from vtp_core.errors import StackFault, suggestion

    registry = registry_of(plugin)
    kind, _, bare = name.rpartition("/")
    entries = [e for e in registry.entries() if e.name == bare and kind in ("", e.kind)]
    if not entries:
        raise StackFault(
            f"nothing named {name!r} is installed{suggestion(bare, {e.name for e in registry.entries()})}"
        )
    for entry in entries:
        registry.find(entry.kind, entry.name)
        if entry.kind == "stacks":
            from vtp_core.stack import find_stack

            typer.echo(find_stack(entry.name, registry).read_text(encoding="utf-8"))
        else:
            from vtp_core.describe import show as page

            typer.echo(page(entry) + "\n")


@app.command()
def plan(
    stack: StackName, overrides: Overrides = None, plugin: Plugins = None, as_json: AsJson = False,
    world_size: Annotated[int, typer.Option(min=1, help="Processes that share the batch.")] = 1,
) -> None:  # fmt: skip
    """Print the plan of a step: forwards, rows, tokens, stages, parameters, FLOPs, memory. Reads no data."""
    loaded = _stack(stack, overrides, plugin)
    from vtp_core.describe import plan as page

    found = page(loaded, world_size)
    typer.echo(json.dumps(found.data, indent=1) if as_json else str(found), nl=as_json)


@app.command()
def train(
    stack: StackName, overrides: Overrides = None, plugin: Plugins = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
    world_size: Annotated[int, typer.Option(min=1, help="With --dry-run: processes that share it.")] = 1,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a stack; ends by writing the report and printing its path."""
    loaded = _stack(stack, overrides, plugin)
    if dry_run:
        from vtp_core.dryrun.run import DryRun

        found = DryRun(loaded, world_size)
        typer.echo(json.dumps(found.data, indent=1) if as_json else str(found), nl=as_json)
        return
    if not _several():
        from vtp_core.run.directory import check_free

        check_free(Path(loaded.run.dir or "runs/DATE"))
    from vtp_core.beginning import begin

    _ended(begin(loaded))


@app.command()
def resume(run: RunPath, plugin: Plugins = None) -> None:
    """Continue a run or a pipeline from its newest valid checkpoint."""
    from vtp_core.pipeline import is_pipeline

    if is_pipeline(run):
        from vtp_core.pipeline.running import resume_pipeline

        piped(resume_pipeline(run, registry_of(plugin), say))
        return
    from vtp_core.run.directory import RunDirectory, check_idle
    from vtp_core.stack import load_run_stack

    loaded = load_run_stack(run, registry_of(plugin))
    if not _several():
        check_idle(run)
    if RunDirectory(run).changed and os.environ.get("RANK", "0") == "0":
        typer.echo(f"{run / 'stack.yaml'} was changed since the run began; it holds as it is now", err=True)
    from vtp_core.training import Training

    _ended(Training(loaded, resume=run))


def _several() -> bool:
    """Whether torchrun or its like started this process: then the first of them looks at the run's directory."""
    return "WORLD_SIZE" in os.environ


def _ended(training: Any) -> None:
    directory = training.run()
    if training.engine.rank != 0:
        return
    typer.echo(f"run     {directory.path}")
    if training.report is not None:
        typer.echo(f"report  {training.report}")


@app.command("eval")
def eval_(run: RunPath, overrides: Overrides = None, as_json: AsJson = False, plugin: Plugins = None) -> None:
    """Run a run's probes again, with overrides such as probes.knn.limit=500; prints, writes nothing."""
    from vtp_core.stack import load_run_stack

    loaded = load_run_stack(run, registry_of(plugin), overrides or ())
    from vtp_core.evaluation import as_row, evaluate
    from vtp_core.run.metrics import encode as encode_row

    readings, left_out = evaluate(run, loaded)
    for line in left_out:
        typer.echo(line, err=True)
    if as_json:
        typer.echo("[\n" + ",\n".join(encode_row(as_row(r)) for r in readings) + "\n]")
        return
    for r in readings:
        typer.echo(f"{r.probe:36} {r.split:16} {r.value:10.4f}  n={r.n:<6} {r.protocol}")


@app.command()
def report(run: RunPath, plugin: Plugins = None) -> None:
    """Write the report of a run again and print its path."""
    from vtp_core.errors import StackFault
    from vtp_core.stack import load_run_stack

    registry = registry_of(plugin)
    loaded = load_run_stack(run, registry)
    from vtp_core.hooks import build_hooks, manager_of
    from vtp_plugins.spec import Spec

    hooks = build_hooks(loaded, Spec())
    manager = manager_of(hooks)
    pages = [page for page in manager.hook.vtp_finish(run=run, registry=registry) if page is not None]
    if not pages:
        raise StackFault(
            "the run's stack names no hook that writes a report; add hooks: {report: {}}, see vtp list hooks"
        )
    for page in pages:
        typer.echo(f"report  {page}")


cli_generation.add(app)
cli_convert.add(app)
cli_export.add(app)


@app.command()
def encode(
    run: RunPath,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Safetensors file to write.")],
    plugin: Plugins = None,
) -> None:
    """Encode pictures to raw latents, one tensor ``latents`` (B, C, h, w)."""
    from vtp_core.files import encode_files

    typer.echo(encode_files(run, files, out, registry_of(plugin)))


@app.command()
def decode(
    run: RunPath,
    latents: Annotated[Path, typer.Argument(metavar="Z", help="What vtp encode wrote.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory for PNG files.")],
    plugin: Plugins = None,
) -> None:
    """Decode latents to PNG pictures."""
    from vtp_core.files import decode_file

    for path in decode_file(run, latents, out, registry_of(plugin)):
        typer.echo(path)


@data_app.command()
def manifest(path: Annotated[Path, typer.Argument(help="A folder of tar shards.")]) -> None:
    """Write manifest.json beside shards: bytes, sha256, samples and fields of each."""
    from vtp_core.data.manifest import write_manifest

    typer.echo(write_manifest(path))
