"""Readers of foreign weight files, pickled numpy arrays and torch state dicts; neither can run code."""

from __future__ import annotations

import importlib
import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np

    from vtp_core.weights_table import Entry

# What a pickled array of numbers needs, by the names numpy 1 and numpy 2 give it.
_ALLOWED = {
    ("numpy", "ndarray"): "numpy",
    ("numpy", "dtype"): "numpy",
    ("numpy.core.multiarray", "_reconstruct"): "numpy._core.multiarray",
    ("numpy._core.multiarray", "_reconstruct"): "numpy._core.multiarray",
}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows numpy arrays and plain containers, and nothing that could act."""

    def find_class(self, module: str, name: str) -> Any:
        home = _ALLOWED.get((module, name))
        if home is None:
            raise pickle.UnpicklingError(f"{module}.{name} is refused: only numpy arrays are read")
        return getattr(importlib.import_module(home), name)


def read_arrays(file: BinaryIO) -> Any:
    """Nested containers of numpy arrays from a pickle.

    Raises:
        pickle.UnpicklingError: it asks for anything else, which is not executed.
    """
    return _ArraysOnly(file).load()


def tensors_of(path: Path, entry: Entry) -> dict[str, np.ndarray]:
    """The arrays of a source file, by the keys our networks use."""
    import numpy as np

    arrays = _state_dict(path) if entry.layout == "torch" else _convolutions(path, *entry.places)
    # safetensors writes memory as it lies, and arrays of both layouts are permuted views
    return {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _convolutions(path: Path, network: str, places: tuple[int, ...]) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        layers = read_arrays(file)[network]
    out = {}
    for i, place in enumerate(places):
        layer = layers[f"Conv_{i}"]
        out[f"features.{place}.weight"] = layer["kernel"].transpose(
            3, 2, 0, 1
        )  # (h, w, in, out) -> (out, in, h, w)
        out[f"features.{place}.bias"] = layer["bias"]
    return out
