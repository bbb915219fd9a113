"""Contracts of the kinds of component other than objectives; letters as in DESIGN: B, K, R, N, D, C.

A component is built as ``Class(spec, *, option=default, ...)``. Its keyword-only arguments are its
options; they are checked against their annotations before any model is built. A class may declare
``sizes``: options by the stack's dial, used where the stack writes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vtp_plugins.generation import Field, Generator, NoisePath, Sampler
from vtp_plugins.importing import Importer

if TYPE_CHECKING:
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
