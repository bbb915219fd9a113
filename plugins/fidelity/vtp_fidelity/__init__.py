"""Distances between sets of images: Fréchet and kernel distance, Inception Score, precision and recall."""

from __future__ import annotations

from vtp_core.nn.lite0 import Lite0
from vtp_fidelity.frechet import frechet_distance
from vtp_fidelity.generation import Generation
from vtp_fidelity.measuring import measure
from vtp_fidelity.npz import save_npz
from vtp_fidelity.pixels import adm_crop, to_bytes
from vtp_fidelity.reconstructed import FDLite0

__all__ = [
    "FDLite0", "Generation", "Lite0", "adm_crop", "frechet_distance", "measure", "save_npz", "to_bytes",
]  # fmt: skip
