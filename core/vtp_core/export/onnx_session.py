"""Graphs in onnxruntime: what they give, how far that is from torch, and whether a directory of them is sound."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vtp_core.errors import DataFault, StackFault, StorageFault
from vtp_core.export import foreign_config
from vtp_core.run import manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = 1
NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ROWS, _SEED = 2, 0
Arrays = dict[str, "NDArray[Any]"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Count = Annotated[int, Field(gt=0, le=1 << 20)]


class _Known(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class File(_Known):
    """A file by size and hash."""

    bytes: int
    sha256: str


class Graph(_Known):
    """One graph: the shape of each input and output, whose first axis is the batch (0)."""

    inputs: dict[Name, list[int]]
    outputs: dict[Name, list[int]]
    error: float


class Config(_Known):
    """Known fields of ``config.json`` of an export to ONNX."""

    model_type: Literal["vtp-plugins-onnx"]
    format: Annotated[int, Field(le=FORMAT)]
    tokenizer: str
    image_size: list[Count]
    graphs: dict[Name, Graph]
    files: dict[Name, File]


def check_installed(names: Sequence[str] = NEEDED) -> None:
    """Refuse where a library is missing.

    Raises:
        StackFault: with the command that installs it.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise StackFault(
            f"ONNX needs {', '.join(missing)}, not installed here. Run:\n  pip install 'vtp-plugins[onnx]'"
        )


def run(file: Path, inputs: Arrays, threads: int = 0) -> Arrays:
    """The outputs of a graph by name, computed on the CPU.

    Args:
        file: of the graph.
        inputs: by name, float32.
        threads: 0 leaves it to onnxruntime.

    Raises:
        DataFault: onnxruntime cannot load or run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime's are no subclasses of anything of ours
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataFault(f"{file}: onnxruntime cannot run it: {why[:300]}") from error


def read_config(path: Path) -> Config:
    """``config.json`` of an export to ONNX.

    Raises:
        DataFault: a field has a wrong value.
    """
    try:
        return Config.model_validate(foreign_config.declared(path))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataFault(f"{path / foreign_config.FILE}: {where}: {first['msg']}; export it again") from error


def looked_at(path: Path) -> dict[str, Any]:
    """What ``vtp verify`` tells of an export to ONNX: hashes, after images went through every graph.

    Raises:
        DataFault: a file is not the one that was written, or gives something else than it says.
        StackFault: onnxruntime is not installed.
    """
    check_installed(("onnxruntime",))
    import onnxruntime

    config = read_config(path)
    for name, entry in config.files.items():
        try:
            manifest.check(path / name, entry.model_dump(), True)
        except StorageFault as error:
            why = str(error).partition("\n")[0]
            raise DataFault(f"{why}; export it again") from error
    drawn = np.random.default_rng(_SEED)
    made: Arrays = {"images": drawn.random((_ROWS, 3, *config.image_size), dtype=np.float32)}
    for name, graph in config.graphs.items():
        missing = [given for given in graph.inputs if given not in made]
        if missing:
            raise DataFault(f"{path / name} reads {missing[0]}, which no graph gives; export it again")
        made |= run(path / name, {given: made[given] for given in graph.inputs})
        _check(path / name, graph, made)
    return {
        "tokenizer": config.tokenizer,
        **{
            name: hashlib.sha256(value.tobytes()).hexdigest()
            for name, value in made.items()
            if name != "images"
        },
        "shape": list(made["latent"].shape),
        "statistics": "standardized" in made,
        "onnxruntime": onnxruntime.__version__,
    }


def _check(file: Path, graph: Graph, made: Arrays) -> None:
    for name, shape in graph.outputs.items():
        if name not in made or list(made[name].shape) != [_ROWS, *shape[1:]]:
            raise DataFault(f"{file} does not give {name} as {foreign_config.FILE} says; export it again")
        if not np.isfinite(made[name]).all():
            raise DataFault(f"{file}: {name} is not finite")
