"""The loss of a generator on a noise path: flow matching (arXiv 2210.02747), SiT, LightningDiT, DiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vtp_core.data.views import Plain
from vtp_core.nn.chunked import wide
from vtp_flow.bound import bits
from vtp_flow.convert import along
from vtp_flow.weighting import Weighting, weights
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec


class Flow(Objective):
    """Distances between a generator's prediction and its path's target; one of weight 0 is not computed.

    The path is the stack's ``generator.path``; it draws the noise levels and says what is predicted.

    Args:
        spec: shapes, and the path.
        mse: weight of the mean squared error; of a score, that of sigma times the score (SiT).
        cosine: weight of 1 - the cosine of velocities over channels (LightningDiT, arXiv 2501.01423).
        vlb: weight of the variational bound in bits, which trains the learned variance alone (DiT).
        weighting: of the squared error by noise level; see ``vtp_flow.weighting``.
        snr_bound: of ``min_snr``, ``snr_at_least`` and ``snr_at_most``.
        view: whose latents are generated.
        cut: whether latents arrive detached; else the loss trains the encoder too.

    Raises:
        ValueError: the stack has no path, or a term makes no sense on it; the message names the key.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        mse: float = 1.0,
        cosine: float = 0.0,
        vlb: float = 0.0,
        weighting: Weighting = "none",
        snr_bound: float = 5.0,
        view: str = "image",
        cut: bool = True,
    ) -> None:
        super().__init__()
        _check(spec.path, mse, cosine, vlb, weighting)
        if not snr_bound > 0:
            raise ValueError(f"snr_bound: {snr_bound} is no ratio; take a number above 0")
        self.path = spec.path
        self.mse, self.cosine, self.vlb = mse, cosine, vlb
        self.weighting, self.snr_bound = weighting, snr_bound
        inputs = ("latent",) if cut else ()
        self.needs = {"flow": Need(view, self._wanted(), "generator", mask=None, cut=inputs)}
        if view == "image":
            self.views = {"image": Plain(spec)}

    def _wanted(self) -> set[str]:
        want = {"prediction"}
        if self.mse:
            want |= {"noise", "u"} if self.path.predicts == "score" else {"target"}
            want |= {"u"} if self.weighting != "none" else set()
        if self.cosine:
            want |= {"target"}
        return want | ({"clean", "noised", "u", "variance"} if self.vlb else set())

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: K crops, R rows, C channels of the latent."""
        of = {
            name: wide(got["flow"][name].flatten(0, 1)) for name in self.needs["flow"].want
        }  # (K, R) -> (K R)
        terms = {}
        if self.mse:
            terms["mse"] = self.mse * self._squared_error(of)
        if self.cosine:
            away = 1 - F.cosine_similarity(of["prediction"], of["target"], dim=1)  # (K R, *grid)
            terms["cosine"] = self.cosine * away.mean()
        if self.vlb:
            terms["vlb"] = self.vlb * self._bound(of)
        return terms

    def _squared_error(self, of: Mapping[str, Tensor]) -> Tensor:
        prediction = of["prediction"]
        if self.path.predicts == "score":  # infinite where clean, but for the factor sigma
            off = along(self.path.coefficients(of["u"]), prediction)[1] * prediction + of["noise"]
        else:
            off = prediction - of["target"]
        squared = off.square().flatten(1).mean(1)  # (K R, C, *grid) -> (K R)
        if self.weighting != "none":
            at = self.path.coefficients(of["u"])
            squared = weights(self.weighting, at, self.path.predicts, self.snr_bound) * squared
        return squared.mean()

    def _bound(self, of: Mapping[str, Tensor]) -> Tensor:
        noised, u = of["noised"], of["u"]
        noise = self.path.convert(of["prediction"].detach(), noised, u, "noise")
        index = self.path.index(u)
        return bits(self.path.chain, of["clean"], noised, noise, of["variance"], index).mean()


def _check(path: Any, mse: float, cosine: float, vlb: float, weighting: str) -> None:
    if path is None:
        raise ValueError("generator.path: flow needs a noise path; write path: {use: linear}")
    if not (mse or cosine or vlb):
        raise ValueError("mse, cosine and vlb are all 0; nothing is left to compute")
    if cosine and path.predicts != "velocity":
        raise ValueError(
            f"cosine: compares velocities, but generator.path.predicts is {path.predicts}; set cosine: 0"
        )
    if vlb and not hasattr(path, "chain"):
        raise ValueError("vlb: bounds a discrete diffusion; set vlb: 0, or generator.path: {use: ddpm}")
    if weighting != "none" and not mse:
        raise ValueError(f"weighting: {weighting} weighs the squared error; set mse above 0, or none")
