"""Samplers of a discrete path: ancestral (arXiv 2006.11239, 2102.09672) and DDIM (arXiv 2010.02502)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from vtp_core.samplers.field import Field
from vtp_core.samplers.levels import Steps
from vtp_plugins.clock import Clock
from vtp_plugins.errors import StackFault
from vtp_plugins.spec import Spec

Clip = Annotated[float, pydantic.Field(gt=0)] | None
Spacing = Literal["even", "stride"]


class DDPM:
    """Samples p(x_{k-1} | x_k) down a chain of ``steps`` kept timesteps: one evaluation a step.

    Args:
        spec: its path is checked.
        steps: kept timesteps; several numbers are those of equal sections of the process, cleanest first.
            DiT's "250" is 250, its "10,5,3" is [10, 5, 3].
        spacing: ``even`` spreads them with both ends kept, ``stride`` takes every so many from t = 0.
        variance: of generators that don't learn it: ``small`` is the posterior's, ``large`` is beta.
        clip: bound of the magnitude of predicted data; None for latents.

    Raises:
        ValueError: a continuous path, or numbers of steps that the process does not have.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        steps: Steps | tuple[Steps, ...] = 250,
        spacing: Spacing = "even",
        variance: Literal["small", "large"] = "large",
        clip: Clip = None,
    ) -> None:
        self.steps, self.spacing, self.variance, self.clip = steps, spacing, variance, clip
        if spec.path is not None:
            _chain(spec.path, self)

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        chain = _chain(field.path, self)
        x = clock.normal("noise", *shape)
        field.start(len(chain))
        for index in reversed(range(len(chain))):
            found, noise = _predicted(field, x, chain, index, condition)
            variance = found.get("variance")
            mean, log_variance, _ = chain.reverse(
                noise, x, index, variance, fixed=self.variance, clip=self.clip
            )
            x = mean
            if index:
                draw = clock.normal(f"step{len(chain) - 1 - index}", *shape)
                x = mean + (log_variance / 2).exp() * draw
        return x


class DDIM:
    """Steps along the predicted noise, with fresh noise in the share ``eta``: one evaluation a step.

    Args:
        spec: its path is checked.
        steps: kept timesteps; several numbers are those of equal sections of the process, cleanest first.
            DiT's "ddim50" is 50 with ``spacing: stride``.
        spacing: ``stride`` takes every so many from t = 0, ``even`` spreads them with both ends kept.
        eta: 0 draws nothing, 1 is as random as ancestral sampling.
        clip: bound of the magnitude of predicted data; None for latents.

    Raises:
        ValueError: a continuous path, or numbers of steps that the process does not have.
    """

    kind: ClassVar[str] = "path"

    def __init__(
        self,
        spec: Spec,
        *,
        steps: Steps | tuple[Steps, ...] = 50,
        spacing: Spacing = "stride",
        eta: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0,
        clip: Clip = None,
    ) -> None:
        self.steps, self.spacing, self.eta, self.clip = steps, spacing, eta, clip
        if spec.path is not None:
            _chain(spec.path, self)

    @torch.no_grad()
    def __call__(self, field: Field, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        chain = _chain(field.path, self)
        x = clock.normal("noise", *shape)
        field.start(len(chain))
        for index in reversed(range(len(chain))):
            _, noise = _predicted(field, x, chain, index, condition)
            data = chain.data(x, noise, index)
            if self.clip is not None:
                data = data.clamp(-self.clip, self.clip)
                noise = chain.noise(x, data, index)
            kept, before = float(chain.cumulative[index]), float(chain.previous[index])
            spread = self.eta * ((1 - before) / (1 - kept) * (1 - kept / before)) ** 0.5
            x = before**0.5 * data + (1 - before - spread**2) ** 0.5 * noise
            if spread:
                x = x + spread * clock.normal(f"step{len(chain) - 1 - index}", *shape)
        return x


def _chain(path: Any, sampler: DDPM | DDIM) -> Any:
    """The path's chain of the sampler's steps."""
    if not hasattr(path, "respaced"):
        raise StackFault(
            f"sampler.use: {type(sampler).__name__} steps along a discrete path; "
            "take generator.path.use: ddpm, or the sampler heun"
        )
    return path.respaced(sampler.steps, sampler.spacing)


def _predicted(
    field: Field, x: Tensor, chain: Any, index: int, condition: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """What the generator gives at a step, and the noise that it means."""
    u = chain.levels[index : index + 1].to(x)
    found = field.predict(x, u, condition)
    return found, field.path.convert(found["prediction"], x, u, "noise")
