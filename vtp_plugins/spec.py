"""What a component is told about the tokenizer it is part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spec:
    """Shapes of the tokenizer under construction; later fields are filled as modules are built.

    Attributes:
        modality: name of the modality, ``image`` or another installed one.
        signal_channels: channels of the raw signal, 3 for images.
        size: size of the signal along its axes, (H, W) in pixels for images, (T,) in samples for audio.
        patch: stride of one token along its axes, (p, p) for images.
        width: D, feature width of the encoder.
        depth: blocks of the encoder; 0 where it has none.
        channels: C, channels of the latent.
        dial: the stack's ``size``; a component may read defaults off it.
        classes: number of labels the dataset knows; 0 without labels.
        generator_width: feature width of the generator; 0 without one.
        condition: what a generator is conditioned on: ``label``, ``embedding``, or empty for nothing.
        condition_width: E, width of a conditioning embedding.
        path: the noise process of the generator, of group ``paths``; None without one.
        teachers: feature width of each frozen teacher, as (name, width) pairs.
    """

    modality: str = "image"
    signal_channels: int = 3
    size: tuple[int, ...] = (64, 64)
    patch: tuple[int, ...] = (8, 8)
    width: int = 0
    depth: int = 0
    channels: int = 0
    dial: str = "tiny"
    classes: int = 0
    generator_width: int = 0
    condition: str = ""
    condition_width: int = 0
    path: Any = None
    teachers: tuple[tuple[str, int], ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis at the stack's own size."""
        return tuple(s // p for s, p in zip(self.size, self.patch, strict=True))

    @property
    def tokens(self) -> int:
        """N, tokens of one signal at the stack's own size."""
        count = 1
        for side in self.grid:
            count *= side
        return count

    def width_of(self, output: str) -> int:
        """Channels of an output by name: D for features, C for anything of the latent.

        Raises:
            ValueError: the output is not a feature or a latent.
        """
        name = output.partition("@")[0]
        if name.startswith("latent"):
            return self.channels
        if name in {"cls", "patches"} or name.startswith("hidden:"):
            return self.width
        raise ValueError(f"on: {output!r} is neither a feature (cls, patches, hidden:k) nor a latent")
