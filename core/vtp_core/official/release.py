"""The release's own methods on a tokenizer of ours, for code that was written for ``VTPModel``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vtp_core.tokenizer import Tokenizer

Layer = Tensor | tuple[Tensor, Tensor]


class VTPModel(nn.Module):
    """A tokenizer under the names and conventions of the release (specs/vtp.md 3).

    Images are (B, 3, H, W), normalised by ImageNet's mean and deviation, going in and coming out; latents
    (B, C, h, w) are raw; embeddings are unit vectors. Every tokenizer of ours will do, trained or imported.
    The release's ``forward`` and its ``normalize=False`` are left out.

    Args:
        tokenizer: whose methods they become.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str | Path, **keys: Any) -> VTPModel:
        """Load a directory or a hub id; arguments and errors are :meth:`Tokenizer.from_pretrained`'s."""
        return cls(Tokenizer.from_pretrained(path, **keys))

    def _images(self, signal: Tensor) -> Tensor:
        shown: Tensor = self.tokenizer.modality.to_display(signal)
        return shown

    def get_reconstruction_latents(self, image: Tensor) -> Tensor:
        """Raw latents (B, C, h, w)."""
        return self.tokenizer.encode(self._images(image))

    def get_latents_decoded_images(self, latents: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), not clamped."""
        signal: Tensor = self.tokenizer.modality.normalise(self.tokenizer.decode(latents))
        return signal

    def get_last_layer_feature(self, image: Tensor, use_bottleneck: bool = False) -> dict[str, Tensor]:
        """``cls_token`` (B, D) and ``patch_tokens`` (B, N, D) after the final norm, or their latents (..., C)."""
        found = self.tokenizer.features(self._images(image))
        cls, patches = found.cls, found.patches
        if use_bottleneck:
            cls = self.tokenizer.bottleneck(cls[:, None])["latent"][:, 0]  # (B, D) -> (B, 1, D) -> (B, C)
            patches = self.tokenizer.bottleneck(patches)["latent"]
        return {"cls_token": cls, "patch_tokens": patches}

    def get_intermediate_layers_feature(
        self, image: Tensor, n: int | Sequence[int] = 1, reshape: bool = False,
        return_class_token: bool = False, norm: bool = True,
    ) -> tuple[Layer, ...]:  # fmt: skip
        """Patches of several blocks, (B, N, D) or with ``reshape`` (B, D, h, w); with the class token, pairs.

        Args:
            image: (B, 3, H, W).
            n: the last n blocks, or numbers of blocks counted from 0.
            reshape: give maps.
            return_class_token: give (patches, cls) for each block.
            norm: apply the final norm to each.
        """
        found = []
        for one in self.tokenizer.intermediate(self._images(image), n, norm):
            patches = one.patches.transpose(1, 2).unflatten(2, one.grid) if reshape else one.patches
            found.append((patches, one.cls) if return_class_token else patches)
        return tuple(found)

    def get_clip_image_feature(self, image: Tensor) -> Tensor:
        """Unit vectors (B, E)."""
        return self.tokenizer.embed_image(self._images(image))

    def get_clip_text_feature(self, text: Tensor) -> Tensor:
        """Ids of tokens (B, L) to unit vectors (B, E)."""
        return self.tokenizer.embed_text(text)

    def get_clip_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled similarities of images to texts, and their transpose."""
        clip = self.tokenizer._exporter("embed_image")
        scores = self.get_clip_image_feature(image) @ self.get_clip_text_feature(text).T
        logits = clip.logit_scale.exp() * scores
        if clip.logit_bias is not None:
            logits = logits + clip.logit_bias
        return logits, logits.T
