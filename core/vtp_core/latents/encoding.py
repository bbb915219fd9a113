"""What is stored of a batch of signals: latents, their mirror images, and what was asked for beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtp_core.data.order import key
from vtp_core.errors import DataFault, StackFault
from vtp_core.statistics import digest, hashed, hexed
from vtp_core.tokenizer import Tokenizer

POSTERIORS = ("mean", "sample", "moments")
MIRRORED = "_flip"
"""Ends the name of a tensor that was made of the mirrored signals."""


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One output of a frozen teacher, stored beside the latents.

    Attributes:
        name: of the teacher in the stack.
        output: ``patches``, ``cls`` or ``hidden:k``.
        module: the teacher itself.
    """

    name: str
    output: str
    module: Any

    @property
    def tensor(self) -> str:
        """Its name in a shard."""
        return f"teacher/{self.name}/{self.output}"


@dataclass(frozen=True, slots=True)
class Encoding:
    """Signals and texts to the tensors of a shard.

    Attributes:
        tokenizer: in eval mode, on its device.
        posterior: ``mean`` stores what ``encode`` gives; ``sample`` one draw of the posterior by sample and
            mirror image; ``moments`` its mean and its std, from which every epoch draws anew.
        flip: store the latent of the mirrored signal too.
        images: store the signals.
        teacher: store an output of it.
        texts: store embeddings of texts.
    """

    tokenizer: Tokenizer
    posterior: str = "mean"
    flip: bool = True
    images: bool = False
    teacher: TeacherOutput | None = None
    texts: bool = False

    def protocol(self) -> dict[str, Any]:
        """Everything that the stored values follow from, but for the data."""
        teacher = self.teacher
        return {
            "tokenizer": hexed(digest(self.tokenizer.state_dict())),
            "size": list(self.tokenizer.spec.size),
            "posterior": self.posterior,
            "flip": self.flip,
            "images": self.images,
            "teacher": teacher and [teacher.name, teacher.output, hexed(hashed(teacher.module.state_dict()))],
            "text": self.texts and hexed(hashed(self.tokenizer._exporter("embed_text").state_dict())),
        }

    @torch.no_grad()
    def __call__(
        self, signals: Tensor, indices: Sequence[int], texts: Sequence[str | None]
    ) -> dict[str, Tensor]:
        """The stored tensors of a batch, on the CPU.

        Args:
            signals: (B, ch, *size), uint8 0..255 or floats in display range.
            indices: of the samples in their dataset.
            texts: one a sample, or None; read where texts are stored.

        Returns:
            ``latents`` (B, C, *grid) float32 and, as asked for, ``deviations`` of the same shape,
            ``teacher/NAME/OUTPUT``, each also with ``_flip`` behind; ``images`` as given; ``embeddings`` (B, E).
        """
        found = self._encoded(signals, indices, mirrored=False)
        if self.flip:
            mirror = self._encoded(signals.flip(-1), indices, mirrored=True)
            found |= {f"{name}{MIRRORED}": value for name, value in mirror.items()}
        if self.images:
            found["images"] = signals
        if self.texts:
            found["embeddings"] = self._embedded(texts)
        stored = {name: _stored(value) for name, value in found.items()}
        for name, value in stored.items():
            if value.is_floating_point() and not value.isfinite().all():
                broken = (~value.flatten(1).isfinite().all(1)).nonzero()[0].item()
                raise DataFault(
                    f"sample {indices[int(broken)]}: its {name} are not finite; the tokenizer's weights, or "
                    "the teacher's, are broken"
                )
        return stored

    def _encoded(self, signals: Tensor, indices: Sequence[int], mirrored: bool) -> dict[str, Tensor]:
        """What depends on the pixels."""
        images = signals.float() / 255 if signals.dtype == torch.uint8 else signals.float()
        if self.posterior == "mean":
            found = {"latents": self.tokenizer.encode(images)}
        else:
            mean, std = self._moments(images)
            if self.posterior == "sample":
                found = {"latents": mean + std * noise(mean, indices, mirrored)}
            else:
                found = {"latents": mean, "deviations": std}
        if self.teacher is not None:
            found[self.teacher.tensor] = self._taught(self.teacher, images)
        return found

    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of the posterior, (B, C, *grid)."""
        tokenizer = self.tokenizer
        x = tokenizer.modality.normalise(images.to(tokenizer.device))
        found = tokenizer.bottleneck(tokenizer.encoder(x, want={"patches": len(x)})["patches"])
        if "posterior" not in found:
            raise StackFault(
                f"posterior={self.posterior}: this tokenizer's bottleneck has none; --posterior mean stores "
                "its latents"
            )
        mean, log_variance = found["posterior"]
        if mean.shape != found["latent"].shape or not torch.allclose(mean, found["latent"]):
            raise StackFault(
                f"posterior={self.posterior}: a later link of the bottleneck changes what is drawn from it; "
                "--posterior mean stores the end of the chain"
            )
        std = (0.5 * log_variance).exp()
        grid = tokenizer.spec.grid
        mean, std = (
            part.transpose(1, 2).unflatten(2, grid) for part in (mean, std)
        )  # (B, N, C) -> (B, C, *grid)
        return mean, std

    def _taught(self, teacher: TeacherOutput, images: Tensor) -> Tensor:
        """The teacher's output, as the engine would compute it."""
        tokenizer = self.tokenizer
        shown = tokenizer.modality.to_display(tokenizer.modality.normalise(images.to(tokenizer.device)))
        found: Mapping[str, Tensor] = teacher.module(shown, want=frozenset({teacher.output}))
        if teacher.output not in found:
            raise StackFault(
                f"teachers.{teacher.name} gives no {teacher.output!r}; it gives {', '.join(sorted(found))}"
            )
        return found[teacher.output]

    def _embedded(self, texts: Sequence[str | None]) -> Tensor:
        """Embeddings of texts, (B, E); zero, which conditions on nothing, where there is no text."""
        embedded = self.tokenizer.embed_text([text or "" for text in texts])
        there = torch.tensor([text is not None for text in texts], device=embedded.device)
        return embedded * there[:, None]


def noise(like: Tensor, indices: Sequence[int], mirrored: bool) -> Tensor:
    """Normal noise of the shape of ``like``: row by row a function of the sample and its mirroring alone."""
    rows = [normal(like.shape[1:], key("posterior", index, mirrored, size=8)) for index in indices]
    return torch.stack(rows).to(like)


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Normal noise as a function of a seed."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _stored(value: Tensor) -> Tensor:
    """On the CPU, fractions in float32."""
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
