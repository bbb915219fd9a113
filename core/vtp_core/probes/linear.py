"""Linear probe: multinomial logistic regression on frozen features, converged, with no randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vtp_core.probes import LeftOut, unseen
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


class LinearProbe:
    """Accuracy of a linear classifier fitted on the trained split, on every other split.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them all but the one that is trained on.
        features: what is classified: ``cls``, mean-pooled ``patches``, mean-pooled ``latent``.
        target: integer field that is predicted.
        penalty: of squared weights, beside the mean cross-entropy of standardised features.
        limit: samples it is fitted on; None takes all.
    """

    fields = frozenset({"label"})

    def __init__(
        self,
        spec: Spec,
        *,
        splits: tuple[str, ...] = (),
        features: tuple[str, ...] = ("cls", "patches", "latent"),
        target: str = "label",
        penalty: Annotated[float, Field(gt=0)] = 1e-3,
        limit: int | None = 50_000,
    ) -> None:
        self.splits, self.features, self.target = splits, features, target
        self.penalty, self.limit = penalty, limit
        self.fields = frozenset({target})

    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        trained, *others = bench.splits
        if not others:
            raise LeftOut(f"a linear probe needs a second split, the dataset has {trained} alone")
        rows = bench.features(trained)
        y = torch.tensor(rows[self.target][: self.limit])
        names, classes = bench.dataset(trained).names.get(self.target), int(y.max()) + 1
        if names is not None:
            classes = len(names)
        out = []
        for name in self.features:
            x = rows[name][: self.limit]
            classify = fit(x, y, classes, self.penalty)
            how = (
                f"logistic regression, {name} {x.shape[1]}-d, standardised, penalty {self.penalty:g}, L-BFGS"
            )
            for split in unseen(bench, self.splits):
                asked = bench.features(split)
                hits = classify(asked[name]).argmax(1) == torch.tensor(asked[self.target])
                protocol = f"{how}, fitted on {len(x)} of {trained} | {self.target}, {classes} classes"
                out.append(
                    Reading(
                        f"linear/{name}/{self.target}",
                        split,
                        hits.double().mean().item(),
                        len(hits),
                        protocol,
                    )
                )
        return out


def fit(x: Tensor, y: Tensor, classes: int, penalty: float, steps: int = 200) -> torch.nn.Linear:
    """A linear classifier of raw features: x (n, D), y (n,) of ``classes`` classes."""
    mean, std = x.double().mean(0), x.double().std(0, correction=0).clamp_min(1e-8)
    z = ((x - mean) / std).float()
    weight = torch.zeros(classes, x.shape[1] + 1, requires_grad=True)  # the last column is the bias
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=steps, tolerance_grad=1e-6, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        slope, bias = weight[:, :-1], weight[:, -1]
        value = F.cross_entropy(z @ slope.T + bias, y) + penalty * slope.square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    out = torch.nn.Linear(x.shape[1], classes).requires_grad_(False)
    slope = weight[:, :-1].detach().double() / std
    out.weight.copy_(slope)
    out.bias.copy_(weight[:, -1].detach() - slope @ mean)
    return out
