"""Contracts of the kinds of component other than objectives; letters as in DESIGN: B, K, R, N, D, C.

A component is built as ``Class(spec, *, option=default, ...)``. Its keyword-only arguments are its
options; they are checked against their annotations before any model is built. A class may declare
``sizes``: options by the stack's dial, used where the stack writes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from vtp_plugins.clock import Clock
    from vtp_plugins.reading import Reading


@runtime_checkable
class Modality(Protocol):
    """Group ``modalities``: an image is (ch, h, w), a waveform (ch, t)."""

    channels: int
    axes: int

    def normalise(self, x: Tensor) -> Tensor:
        """What views give, uint8 0..255 or float (B, ch, *size), to what the encoder reads; float."""
        ...

    def to_display(self, x: Tensor) -> Tensor:
        """The inverse, to [0, 1] for images and [-1, 1] for audio, unclamped."""
        ...


@runtime_checkable
class Dataset(Protocol):
    """Group ``datasets``: samples by index; built as ``Class(spec, split=..., **options)``.

    A sample is a dict of raw fields: ``image`` (uint8 (3, H, W)), ``text`` (str), ``label`` (int), ...
    A field that a sample lacks is None. Reading a broken sample raises ``ValueError`` or ``OSError``.

    A dataset whose samples differ between epochs, though no view makes them so, also has
    ``draw(index, key)``: the sample as one epoch sees it, a pure function of both. ``key`` stands for seed, epoch
    and sample; ``dataset[index]`` stays the sample without any draw. ``prepared`` names raw fields that are
    views of one crop already, since something provided was made of them; they are handed on as (1, ...).
    """

    fields: frozenset[str]
    """Raw fields that samples have."""
    provides: frozenset[str]
    """Fields that are outputs ready-made: ``latent`` (C, *grid), ``teacher:NAME/OUTPUT``; no module runs for them."""
    splits: tuple[str, ...]
    """Names of the splits; the first is trained on."""
    names: Mapping[str, Sequence[str]]
    """Names behind integer fields, ``{"label": ["cat", ...]}``."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """Indices of one epoch: a pure function of its arguments."""
        ...

    def fingerprint(self) -> str:
        """Hash of what the samples are, kept with every number."""
        ...


@runtime_checkable
class View(Protocol):
    """Group ``views``: makes what one forward reads, in a loader's worker. Equal views compare equal.

    ``crops`` is K, or None for a view without a crop axis (tokens of a text). Random draws use torch's
    global generator, which the loader seeds by (seed, epoch, sample, view).
    """

    @property
    def field(self) -> str: ...
    @property
    def crops(self) -> int | None: ...

    def __call__(self, value: Any) -> Tensor:
        """One raw value to (K, ...), or to (...) where ``crops`` is None."""
        ...


@runtime_checkable
class MaskSampler(Protocol):
    """Brought by an objective's ``masks``; draws once per step for a view."""

    @property
    def view(self) -> str: ...

    def __call__(self, crops: int, rows: int, grid: tuple[int, ...], clock: Clock) -> Tensor:
        """Masks of this process's rows, (K, R, N) bool on the CPU, True where hidden."""
        ...


class Encoder(Protocol):
    """Group ``encoders``. Declares ``width``, ``depth``, ``patch``, ``size``, and may declare ``anchors``.

    ``forward`` may return more outputs and more rows than asked; the engine slices prefixes.
    """

    width: int
    depth: int
    patch: tuple[int, ...]
    size: tuple[int, ...]

    def __call__(
        self,
        x: Tensor,
        *,
        want: Mapping[str, int] | None = None,
        mask: Tensor | None = None,
        select: Mapping[str, Tensor] | None = None,
        drop: float | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Tensor]:
        """Features of x (B, ch, *size), normalised.

        Args:
            x: signals.
            want: output -> rows: that output is read for the first so many rows of x. ``cls`` (B, D),
                ``patches`` (B, N, D), ``hidden:k`` (B, N, D) after block k (1 is the first), and
                ``patches@NAME`` (M, D), whose places are ``select[NAME]``. None wants cls and patches.
            mask: (B, N) bool; True is replaced by the mask token.
            select: name -> (M,) int64 flat places in (B * N).
            drop: drop-path rate; None takes the module's own.
            clock: draws; without it nothing is random.
        """
        ...


class Bottleneck(Protocol):
    """Group ``bottlenecks``: one link of the chain. Also declares ``channels`` (C out).

    ``forward`` returns ``latent`` (the clean value handed on) and may return named extras
    (``latent.sample``, ``latent.noisy``, ``latent.quantised``, ``indices``, ``posterior``). ``carries``
    names the output that the decoder (and the next link) reads in training, ``latent`` by default.
    Random only if a clock is given and the module is in training mode.
    """

    channels: int

    def __call__(self, x: Tensor, clock: Clock | None = None) -> dict[str, Tensor]:
        """Tokens (..., N, C in) to tokens (..., N, C)."""
        ...


class Decoder(Protocol):
    """Group ``decoders``. ``anchors`` maps names (``last``) to the parameters gradients are balanced at."""

    anchors: Mapping[str, nn.Parameter]

    def __call__(
        self, z: Tensor, *, want: frozenset[str] = frozenset({"decoded"}), clock: Clock | None = None
    ) -> dict[str, Tensor]:
        """Latents (B, C, *grid) to ``decoded`` (B, ch, *size), normalised, and ``decoder.hidden:k`` (B, N, D)."""
        ...


class Teacher(Protocol):
    """Group ``teachers``: a frozen model that owns its resize and normalisation. Declares ``width``."""

    width: int

    def __call__(self, x: Tensor, *, want: frozenset[str]) -> dict[str, Tensor]:
        """Signals in display range, (B, ch, *size), to ``cls`` (B, D), ``patches`` (B, N, D), ``hidden:k``."""
        ...


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

    def __call__(self, generator: Any, shape: tuple[int, ...], condition: Any, clock: Clock) -> Tensor:
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


class Bench(Protocol):
    """What a probe gets: a tokenizer in eval mode and the stack's data, each split encoded once."""

    @property
    def splits(self) -> tuple[str, ...]: ...
    @property
    def device(self) -> torch.device: ...
    def dataset(self, split: str) -> Dataset: ...
    def images(self, split: str) -> Iterator[Tensor]:
        """Signals in display range, batches of (B, ch, *size), centre-prepared to the stack's size."""
        ...

    def reconstructions(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (original, reconstruction), display range, clamped."""
        ...

    def features(self, split: str) -> dict[str, Any]:
        """``cls`` (n, D), ``patches`` (n, D) mean-pooled, ``latent`` (n, C) mean-pooled, raw fields as lists."""
        ...


class Probe(Protocol):
    """Group ``probes``: measures a tokenizer; ``fields`` are the raw fields it cannot do without.

    A class that sets ``subject = "generator"`` is called with a ``vtp_core.generation.Generator`` in place
    of the tokenizer, and left out where the stack has no generator.
    """

    fields: frozenset[str]

    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        """Readings of every split it applies to."""
        ...


class Importer(Protocol):
    """Group ``importers``: foreign weights to ours."""

    def __call__(self, source: Path, out: Path) -> None: ...


__all__ = [
    "Bench",
    "Bottleneck",
    "Dataset",
    "Decoder",
    "Encoder",
    "Field",
    "Generator",
    "Importer",
    "MaskSampler",
    "Modality",
    "NoisePath",
    "Probe",
    "Sampler",
    "Teacher",
    "View",
]
