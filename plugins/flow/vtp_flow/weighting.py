"""Weights of the squared error by noise level."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vtp_flow.convert import Coefficients, determinant

Weighting = Literal[
    "none", "velocity", "likelihood", "min_snr", "snr", "snr_at_least", "snr_at_most", "inverse_variance"
]

# Exponents of D, alpha and sigma (vtp_flow.convert), so that factors cancel before anything is 0 / 0.
OF_NOISE = {"velocity": (2, -2, 0), "likelihood": (1, -1, -1), "min_snr": (0, 0, 0)}
TO_NOISE = {"noise": (0, 0, 0), "score": (0, 0, 0), "velocity": (-2, 2, 0), "data": (0, 2, -2)}
AS_IS = {
    "inverse_variance": (0, 0, -2),
    "snr": (0, 1, -1),
    "snr_at_least": (0, 1, -1),
    "snr_at_most": (0, 1, -1),
}


def weights(kind: Weighting, at: Coefficients, predicts: str, bound: float) -> Tensor:
    """What the squared error of a prediction is multiplied by at each level, shaped as the coefficients.

    ``velocity``, ``likelihood`` (SiT, arXiv 2401.08740) and ``min_snr`` (arXiv 2303.09556)
    are weights of the noise's error, whatever is predicted: the prediction's error is carried over to it. So
    ``velocity`` is the velocity's own squared error. The rest multiply the error as it is (DDT's options).

    Args:
        kind: ``min_snr`` bounds alpha^2 / sigma^2; ``inverse_variance`` is 1 / sigma^2; ``snr`` is
            alpha / sigma, at least or at most the bound.
        at: alpha, sigma and their derivatives.
        predicts: ``score`` stands for sigma times the score, whose error is the noise's.
        bound: of the ratios.
    """
    alpha, sigma, _, _ = at
    if kind in AS_IS:
        powers = AS_IS[kind]
    elif kind in OF_NOISE:
        ours, theirs = OF_NOISE[kind], TO_NOISE[predicts]
        powers = (ours[0] + theirs[0], ours[1] + theirs[1], ours[2] + theirs[2])
    else:
        return alpha.new_ones(alpha.shape)
    moved = determinant(at) if powers[0] else alpha  # infinite at the clean end of some paths
    weight: Tensor = moved ** powers[0] * alpha ** powers[1] * sigma ** powers[2]
    if kind == "min_snr":
        return weight * (bound * (sigma / alpha) ** 2).clamp(max=1)
    if kind == "snr_at_least":
        return weight.clamp(min=bound)
    return weight.clamp(max=bound) if kind == "snr_at_most" else weight
