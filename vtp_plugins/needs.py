"""What an objective reads, said as data: the engine plans forwards from it and computes each tensor once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Need:
    """Outputs ``want`` of one forward of view ``view``.

    Needs that are equal in everything but ``want`` share one forward.

    Args:
        view: name of the view that is read; a raw field (``text``, ``label``) is a view whose only
            output is ``input``.
        want: outputs by name. Of the encoder: ``input cls patches hidden:k patches@MASK`` (features at
            the places that the mask sampler MASK hides, (M, D), in the order of ``patches[mask]``); of
            the bottleneck: ``latent latent.sample latent.noisy latent.cls latent.quantised latent@MASK
            indices posterior``; of the decoder: ``decoded decoder.hidden:k``; of a generator:
            ``prediction variance hidden:k``, and what it was fed: ``clean noise noised u target``.
        source: ``student``, ``ema`` (EMA teacher), ``teacher:<name>`` (frozen model), ``generator``.
        mask: ``any`` takes the masked forward of the view if an active objective masks it; ``None``
            insists on no mask; a name asks for that sampler.
        drop: drop-path rate of this forward in [0, 1); ``None`` takes the encoder's own.
        mode: ``train`` or ``eval``, set on the modules for this forward.
        through: modules that pass gradient and receive none (``generator``, ``encoder``, ...).
        cut: inputs taken detached (``latent`` for a generator that must not train the tokenizer).
        draw: needs with one draw name share noise level and noise.
    """

    view: str
    want: frozenset[str]
    source: str = "student"
    mask: str | None = "any"
    drop: float | None = None
    mode: str = "train"
    through: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    draw: str = "main"

    def __init__(
        self,
        view: str,
        want: str | Iterable[str],
        source: str = "student",
        mask: str | None = "any",
        drop: float | None = None,
        mode: str = "train",
        through: Iterable[str] = (),
        cut: Iterable[str] = (),
        draw: str = "main",
    ) -> None:
        values = {
            "view": view,
            "want": frozenset([want] if isinstance(want, str) else want),
            "source": source,
            "mask": mask,
            "drop": drop,
            "mode": mode,
            "through": tuple(through),
            "cut": tuple(cut),
            "draw": draw,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if not self.want:
            raise ValueError(f"Need({self.view!r}): 'want' is empty; name at least one output")
        if self.mode not in {"train", "eval"}:
            raise ValueError(f"Need({self.view!r}): mode is 'train' or 'eval', not {self.mode!r}")
        if self.source not in {"student", "ema", "generator"} and not self.source.startswith("teacher:"):
            raise ValueError(
                f"Need({self.view!r}): source {self.source!r} is none of student, ema, generator, teacher:<name>"
            )


@dataclass(slots=True)
class Outputs:
    """What one need receives.

    Tokens are (K, R, N, C), ``cls`` is (K, R, D), images are (K, R, ch, *size), and entries with
    ``@`` are (M, C). A raw field is (R, ...) or a list of R values.

    Attributes:
        values: outputs by name; ``got["student"]["cls"]`` reads one.
        mask: (K, R, N) bool, True where hidden, of the sampler that the need names; else None.
        grid: tokens along each axis, ``(h, w)`` for images and ``(t,)`` for audio.
    """

    values: dict[str, Any] = field(default_factory=dict)
    mask: Tensor | None = None
    grid: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise LookupError(f"output {name!r} was not asked for; the need wants {sorted(self.values)}")
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values
