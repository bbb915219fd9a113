"""Interpolation strips: between two noises at one condition, and between two conditions at one noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtp_report.draws import Draws, embedded, pictures
from vtp_report.pictures import Picture, picture
from vtp_report.record import AbsentError

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-4  # sine below which two directions are one, or opposite


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture, at a share of the way in percent."""

    picture: Picture
    share: int


@dataclass(frozen=True, slots=True)
class Strip:
    """Frames from one end to the other, and the names of the ends."""

    first: str
    second: str
    frames: list[Frame]
    labels: bool = False


def slerp(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from a to b, of one shape, (F, *shape) at shares (F,).

    Straight where the two have one direction, or opposite ones.
    """
    import torch

    t = shares.to(a).view(-1, *[1] * a.ndim)
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    if torch.sin(angle) < SMALL:
        return a + t * (b - a)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def noises(draws: Draws, frames: int) -> Strip:
    """From noise 0 to noise 1, at the first condition."""
    from vtp_core.generation import noise_of

    _samples_by_noise(draws)
    generator, one = draws.best, draws.conditions[0]
    first, second = noise_of(generator, 2, draws.seed)
    shares = _inner(frames)
    inner = pictures(generator, slerp(first, second, shares), embedded(generator, [one.value] * len(shares)))
    ends = draws.samples(guided=draws.guided is not None)[0]  # both are in the grid already
    name = f", {one.name}" if one.name else ""
    return _strip("noise 0" + name, "noise 1" + name, ends[0], inner, ends[1], shares)


def conditions(draws: Draws, frames: int) -> Strip:
    """From the first condition to the second, at noise 0."""
    from vtp_core.generation import noise_of
    from vtp_report.mixing import between

    _samples_by_noise(draws)
    known = [one for one in draws.conditions if one.value is not None][:2]
    if len(known) < 2:
        raise AbsentError("two labels or captions are needed to go from one to the other")
    generator, shares = draws.best, _inner(frames)
    labels = generator.spec.condition == "label"
    if labels:
        first, second = (int(one.value or 0) for one in known)
        generator, condition = between(generator, first, second, shares)
    else:
        table = embedded(generator, [one.value for one in known])
        assert table is not None
        condition = slerp(table[0], table[1], shares)
    noise = noise_of(draws.best, 1, draws.seed)
    inner = pictures(generator, noise.repeat(len(shares), *[1] * (noise.ndim - 1)), condition)
    ends = draws.samples(guided=draws.guided is not None)[:, 0]
    return _strip(known[0].name, known[1].name, ends[0], inner, ends[1], shares, labels)


def _samples_by_noise(draws: Draws) -> None:
    if draws.plain.sampler.kind != "path":
        raise AbsentError("this generator does not begin at a noise, so there is nothing to interpolate")


def _inner(frames: int) -> Tensor:
    """Shares of the frames between the ends."""
    import torch

    return torch.linspace(0, 1, frames)[1:-1]


def _strip(
    first: str, second: str, start: Tensor, inner: Tensor, stop: Tensor, shares: Tensor, labels: bool = False
) -> Strip:
    percents = [0, *(round(100 * share) for share in shares.tolist()), 100]
    frames = [
        Frame(picture(x, f"{percent} % of the way from {first} to {second}"), percent)
        for x, percent in zip([start, *inner, stop], percents, strict=True)
    ]
    return Strip(first, second, frames, labels)
