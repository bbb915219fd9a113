"""What samplers integrate: a generator joined with its path, its guidance and the reuse of its state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.reuse import Reuse
from vtp_plugins.errors import StackFault
from vtp_plugins.protocols import Generator, NoisePath


class Field:
    """The guided field of a generator, :class:`vtp_plugins.protocols.Field`.

    With ``cfg`` both branches are one forward over 2R rows, conditioned ones first, at levels that are
    guided, and R rows at the others. With ``auto`` both generators see the same condition. u stays (1,), so
    that its embedding is computed once. Guidance acts on raw predictions; a learned variance is that of the
    conditioned branch. Latents wider than the generator's parameters are narrowed for it alone, so that an
    integration may run in float64.

    Under reuse the state made at a step serves the following ones until the next of its refreshed steps. A
    step above the guided interval then makes the null branch's state too, for the steps that will want it.

    Args:
        network: the generator, in eval mode.
        path: its noise process.
        guidance: None or a scale of 1 is none.
        null: a condition to its null, of the same shape; ``cfg`` needs it.
        weak: the second generator that ``auto`` needs, of the same path.
        reuse: None makes the state at every step.

    Attributes:
        evaluations: forwards of ``network``, batched branches as one; those of ``weak`` are not counted.
        refreshes: how many of them made the state anew; all of them without reuse.
        step: index of the current step, from 0.

    Raises:
        ValueError: guidance lacks its ``null`` or ``weak``.
    """

    def __init__(
        self,
        network: Generator,
        path: NoisePath,
        *,
        guidance: Guidance | None = None,
        null: Callable[[Any], Any] | None = None,
        weak: Generator | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        self.path, self.null, self.reuse = path, null, reuse
        self.guidance = guidance if guidance is not None and guidance.scale != 1 else None
        use = self.guidance.use if self.guidance is not None else ""
        if use == "cfg" and null is None:
            raise ValueError(
                "guidance: cfg needs a null condition, and the generator has no condition; write sampler.guidance=null"
            )
        if use == "auto" and weak is None:
            raise ValueError("guidance: auto needs a second, weaker generator; name one, or use: cfg")
        discrete = hasattr(path, "respaced")  # only such a path has variances to be learned
        self._strong = _Network(network, reuse is not None, discrete)
        self._weak = _Network(weak, reuse is not None) if use == "auto" and weak is not None else None
        self._refreshed: frozenset[int] = frozenset()
        self.step, self._level = -1, -1.0

    @property
    def evaluations(self) -> int:
        return self._strong.evaluations

    @property
    def refreshes(self) -> int:
        return self._strong.refreshes

    def reusing(self, reuse: Reuse | None) -> Field:
        """The same field with another reuse; its counts begin at 0."""
        other = copy.copy(self)
        other.reuse = reuse
        other._strong = self._strong.keeping(reuse is not None)
        other._weak = self._weak and self._weak.keeping(reuse is not None)
        return other

    def state(self, rows: int) -> Any:
        """What the generator last gave as its state, of the first rows: those are conditioned."""
        return first(self._strong.state, rows)

    def start(self, steps: int) -> None:
        """Announce an integration of so many steps, 0 where the sampler chooses them as it goes.

        Raises:
            StackFault: the steps don't suit the reuse.
        """
        self._refreshed = self.reuse.refreshed(steps) if self.reuse is not None else frozenset()
        self.step, self._level = -1, -1.0
        for network in (self._strong, self._weak):
            if network is not None:
                network.forget()

    def predict(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> dict[str, Tensor]:
        """``prediction``, guided, and ``variance`` where a generator of a discrete path learns it.

        Args:
            x: latents, (R, C, *grid).
            u: their level, (1,); may be wider than x.
            condition: of R rows.
            at: the level (1,) at which this step began; it decides on guidance and reuse for all
                evaluations of one step. None takes u.
        """
        guided, both, fresh = self._decided(u if at is None else at)
        rows, narrow = len(x), x
        if both and self.null is not None:
            narrow, condition = torch.cat([x, x]), torch.cat([condition, self.null(condition)])
        found = self._strong(narrow, u, condition, fresh)
        strong = found["prediction"][:rows]
        if guided and self.guidance is not None:
            weak = found if self._weak is None else self._weak(x, u, condition, fresh)
            strong = self.guidance.mixed(strong, weak["prediction"][-rows:])
        return {name: value[:rows] for name, value in found.items()} | {"prediction": strong}

    def velocity(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> Tensor:
        """dx/du, guided; arguments as for :meth:`predict`.

        Raises:
            ValueError: the path has no velocities.
        """
        return self._converted(x, u, condition, at, "velocity")

    def score(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None = None) -> Tensor:
        """Gradient of the log density, guided; arguments as for :meth:`predict`."""
        return self._converted(x, u, condition, at, "score")

    def _converted(self, x: Tensor, u: Tensor, condition: Any, at: Tensor | None, to: str) -> Tensor:
        found = self.predict(x, u, condition, at)["prediction"]
        return self.path.convert(found, x, u, to).to(x.dtype)  # u may be wider than the latents

    def _decided(self, at: Tensor) -> tuple[bool, bool, bool]:
        """Whether this step is guided, whether it runs both branches, whether it makes the state anew."""
        guidance = self.guidance
        if self.reuse is None and (guidance is None or guidance.everywhere):
            return guidance is not None, self._weak is None and guidance is not None, True
        level = float(at)
        if level != self._level:
            self.step, self._level = self.step + 1, level
        fresh = not self._refreshed or self.step in self._refreshed
        guided = guidance is not None and guidance.applies(level)
        soon = self.reuse is not None and fresh and guidance is not None and guidance.ahead(level)
        return guided, self._weak is None and (guided or soon), fresh


class _Network:
    """A generator with what it gave as its state.

    Args:
        call: the generator.
        keeps: whether its state is asked for and kept.
        variance: whether its variance is asked for, if it learns one.
    """

    def __init__(self, call: Generator, keeps: bool, variance: bool = False) -> None:
        self.call, self.keeps = call, keeps
        self.state: Any = None
        self.rows = self.evaluations = self.refreshes = 0
        parameters: Iterable[Tensor] = getattr(call, "parameters", tuple)()
        self.dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
        self.want = frozenset({"prediction", "variance"} if variance else {"prediction"})

    def keeping(self, keeps: bool) -> _Network:
        return _Network(self.call, keeps, "variance" in self.want)

    def forget(self) -> None:
        self.state, self.rows = None, 0

    def __call__(self, x: Tensor, u: Tensor, condition: Any, fresh: bool) -> dict[str, Tensor]:
        dtype = self.dtype or x.dtype
        given = x.to(dtype), u.to(dtype), condition
        self.evaluations += 1
        if self.keeps and not fresh and len(x) <= self.rows:
            out = self._out(given, self.want, first(self.state, len(x)))
        else:
            self.refreshes += 1
            out = self._out(given, self.want | {"state"} if self.keeps else self.want, None)
            self.state, self.rows = out.pop("state", None), len(x)
        return {name: value.to(x.dtype) for name, value in out.items()}

    def _out(self, given: tuple[Tensor, Tensor, Any], want: frozenset[str], state: Any) -> dict[str, Any]:
        try:
            return {name: value for name, value in self.call(*given, want, state).items() if name in want}
        except LookupError as error:
            if "variance" not in want:
                if "state" in want:
                    raise StackFault(f"sampler.reuse: {error}; it keeps no state, drop reuse") from error
                raise
        self.want -= {"variance"}  # it learns none, and says so by refusing
        return self._out(given, want - {"variance"}, state)


def first(state: Any, rows: int) -> Any:
    """A state of the first rows: of a tensor, or of tensors in tuples, lists and dicts."""
    if isinstance(state, Tensor):
        return state[:rows]
    if isinstance(state, dict):
        return {name: first(value, rows) for name, value in state.items()}
    return type(state)(first(value, rows) for value in state)
