"""``python -m vtp_fidelity SAMPLES REFERENCE``: the metrics of one set of images against another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from vtp_core.errors import Fault, StackFault, suggestion
from vtp_core.evaluation import as_row
from vtp_core.run.metrics import encode
from vtp_fidelity.measuring import measure
from vtp_fidelity.networks import Features, Layer, Metric
from vtp_fidelity.pixels import Crop

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compare(
    samples: Annotated[Path, typer.Argument(metavar="SAMPLES", help="A folder of pictures, or an npz.")],
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The same; or an npz with mu and sigma, for FID.")
    ],
    features: Annotated[str, typer.Option(help="lite0 or inception, whose numbers alone are FID.")] = "lite0",
    layer: Annotated[
        str | None, typer.Option(help="Of lite0: block10, or pool for tens of thousands.")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Of fd,kid,is,pr; without it all.")] = "",
    size: Annotated[int | None, typer.Option(min=1, help="Crop pictures of folders to N x N.")] = None,
    crop: Annotated[str, typer.Option(help="How: adm, square or bilinear.")] = "adm",
    device: Annotated[str, typer.Option(help="Where the network runs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as probes.jsonl has them.")] = False,
) -> None:
    """FD, KID, Inception Score, precision and recall of SAMPLES against REFERENCE."""
    chosen: Any = {
        "features": _known("features", features, Features),
        "layer": None if layer is None else _known("layer", layer, Layer),
        "metrics": [_known("metrics", name, Metric) for name in metrics.split(",") if name],
        "crop": _known("crop", crop, Crop),
    }
    readings, notes = measure(samples, reference, **chosen, size=size, device=device)
    for line in notes:
        typer.echo(line, err=True)
    for r in readings:
        plain = f"{r.probe:18} {r.value:10.4f}  {r.protocol}"
        typer.echo(encode({"step": 0, **as_row(r)}) if as_json else plain)


def _known(option: str, value: str, choices: Any) -> str:
    if value not in (known := get_args(choices)):
        raise StackFault(f"--{option} {value}{suggestion(value, known)}")
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a fault ends with its message and exit code."""
    try:
        app(arguments)
    except Fault as fault:
        typer.echo(f"vtp_fidelity: {fault}", err=True)
        raise SystemExit(fault.code) from None


if __name__ == "__main__":
    main()
