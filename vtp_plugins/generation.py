"""Contracts of what generates: noise paths, generators, samplers, and the field that samplers integrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vtp_plugins.clock import Clock


class NoisePath(Protocol):
    """Group ``paths``: a noise process x_u = alpha(u) x + sigma(u) noise; u in [0, 1], 0 is clean.

    A velocity is dx_u/du: noise - data on the straight path. A path without velocities (``ddpm``) still
    converts between noise, data and score. u is (R,), or (1,) for one level of all rows; x is (R, C, *grid).
    """

    @property
    def predicts(self) -> str:
        """What :meth:`target` is and the generator predicts: ``velocity``, ``noise``, ``data`` or ``score``."""
        ...

    def draw(self, name: str, rows: int, clock: Clock) -> Tensor:
        """Noise levels u of a training step, (R,); their law may depend on ``clock.share``."""
        ...

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives by u, each shaped as u, in float32 at least."""
        ...

    def mix(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """x at level u."""
        ...

    def target(self, x: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """What the generator predicts, (R, C, *grid)."""
        ...

    def convert(self, value: Tensor, x: Tensor, u: Tensor, to: str, given: str | None = None) -> Tensor:
        """A prediction ``value`` at ``x`` = x_u from one meaning to another.

        Args:
            value: what the generator gave, or any of the four quantities.
            x: the noised latent.
            u: its level.
            to: ``velocity``, ``noise``, ``data`` or ``score``.
            given: what ``value`` is; without it what the path predicts.
        """
        ...


class Generator(Protocol):
    """Group ``generators``. Declares ``width`` and ``depth``; built with ``network=`` under ``share: encoder``.

    The constructor reads off ``spec``: ``channels``, ``grid``, ``classes`` and ``condition``.
    """

    width: int

    def __call__(
        self,
        x: Tensor,
        u: Tensor | None,
        condition: Any,
        want: frozenset[str] = frozenset({"prediction"}),
        state: Any = None,
    ) -> dict[str, Any]:
        """Latents at a noise level to what ``want`` names; stops early where only ``hidden:k`` is wanted.

        Args:
            x: (R, C, *grid), standardised.
            u: (R,), or (1,) for one level of all rows, whose embedding is then computed once; None without
                a path.
            condition: labels (R,) int64, whose null class is ``spec.classes``; or embeddings (R, E), whose
                null is the zero vector; or None.
            want: ``prediction`` (R, C, *grid), ``variance`` (R, C, *grid) where it is learned, ``hidden:k``
                (R, N, D) after block k, 1 is the first, and ``state``, what a later call may reuse.
            state: what an earlier call gave as ``state``; the part behind it is not computed again.
        """
        ...


class Sampler(Protocol):
    """Group ``samplers``. Declares ``kind``, the kind of generator it takes: ``path`` or ``autoregressive``.

    A ``path`` sampler is handed a :class:`Field`, any other one the generator itself.
    """

    @property
    def kind(self) -> str: ...

    def __call__(self, generator: Any, /, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
        """Standardised latents of ``shape`` = (R, C, *grid), from noise that ``clock`` draws."""
        ...


class Field(Protocol):
    """What ``path`` samplers integrate: a generator with its path, guidance and reuse inside.

    u is a tensor (1,) on the device of x, and may be wider than x. ``at`` is the level (1,) at which a step
    began, for those of its evaluations that are elsewhere (Heun's second slope): it decides on guidance and
    reuse, so that all evaluations of one step belong to one field. None takes u.
    """

    @property
    def path(self) -> NoisePath: ...
    @property
    def evaluations(self) -> int:
        """Forwards of the generator, batched branches of guidance as one."""
        ...

    def start(self, steps: int) -> None:
        """Announce an integration of so many steps, 0 where the sampler chooses them; forgets kept states."""
        ...

    def predict(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> dict[str, Tensor]:
        """``prediction``, guided, and ``variance`` where the generator learns it."""
        ...

    def velocity(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> Tensor:
        """dx/du, guided."""
        ...

    def score(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> Tensor:
        """Gradient of the log density, guided."""
        ...


__all__ = ["Field", "Generator", "NoisePath", "Sampler"]
