"""CLIP: pictures and their captions meet in one space (arXiv 2103.00020); SigLIP's loss too (2303.15343)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.data.views import Plain
from vtp_core.nn.chunked import contrastive, wide
from vtp_core.nn.text import SMALLEST, VOCABULARY, Tokens, build_tower, encode_text
from vtp_plugins.clock import Clock
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import Objective
from vtp_plugins.spec import Spec

LARGEST = math.log(100)  # of the scale's logarithm, as in CLIP


class Clip(Objective):
    """Contrast of each picture with the captions of the whole batch of all processes, both ways.

    Args:
        spec: shapes of the tokenizer.
        on: what embeds a picture: an image-level output, or the mean of ``patches`` or of ``latent``.
        loss: ``softmax`` is CLIP's, ``sigmoid`` SigLIP's.
        view: which view of the picture is read.
        width: of the text tower.
        depth: its blocks.
        heads: its attention heads.
        context: tokens of a caption, start and end included; longer captions are cut.
        embedding: E, width of the common space.
        vocabulary: entries of the token table. 49,408 is CLIP's whole BPE; fewer keep its first merges,
            so that rare words take more tokens.
        mlp_ratio: hidden width of the text tower's feed-forwards over ``width``.
        layer_scale: initial factor of its residual branches; None has none.
        quick_gelu: x sigmoid(1.702 x) for GELU, as OpenAI's weights want it.
        projection_bias: add a bias to the text's projection.
    """

    exports: tuple[str, ...] = ("embed_image", "embed_text", "embed_ids")
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"width": 128, "depth": 2, "heads": 4, "context": 32, "embedding": 128, "vocabulary": 8192},
    }

    def __init__(
        self,
        spec: Spec,
        *,
        on: Literal["cls", "latent.cls", "patches", "latent"] = "cls",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        view: str = "image",
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        context: int = 77,
        embedding: int = 768,
        vocabulary: int = VOCABULARY,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        quick_gelu: bool = False,
        projection_bias: bool = False,
    ) -> None:
        super().__init__()
        self.coupled = True
        if vocabulary < SMALLEST:  # of others' weights: nothing turns a text into these ids
            self.exports = ("embed_image", "embed_ids")
        self.on, self.loss, self.tokens = on, loss, Tokens(context, vocabulary)
        self.needs = {"image": Need(view, {on}, mask=None), "text": Need("tokens", {"input"}, mask=None)}
        self.views = {"tokens": self.tokens}
        if view == "image":
            self.views["image"] = Plain(spec)
        self.text = build_tower(
            width, depth, heads, context, embedding, vocabulary, mlp_ratio=mlp_ratio,
            layer_scale=layer_scale, quick_gelu=quick_gelu, projection_bias=projection_bias,
        )  # fmt: skip
        self.project = nn.Linear(spec.width_of(on), embedding, bias=False)
        nn.init.normal_(self.project.weight, std=spec.width_of(on) ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if loss == "softmax" else 10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if loss == "sigmoid" else None

    def forward(self, got: Mapping[str, Outputs], clock: Clock) -> dict[str, Tensor]:
        """Shapes: R rows of one crop, L tokens, E the common space."""
        image = self.embed_image({self.on: got["image"][self.on].squeeze(0)})  # (1, R, ...) -> (R, E)
        text = F.normalize(wide(encode_text(self.text, got["text"]["input"])), dim=-1)  # (R, L) -> (R, E)
        scale = wide(self.logit_scale)
        scale = (
            scale + (scale.clamp(max=LARGEST) - scale).detach()
        ).exp()  # as if clamped after the last step
        return {"contrast": contrastive(image, text, scale, clock, self.logit_bias, self.loss)}

    @torch.no_grad()
    def settle(self, clock: Clock) -> None:
        """Keep the scale at 100 or less."""
        self.logit_scale.clamp_(max=LARGEST)
        super().settle(clock)

    def embed_image(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features by output name, (B, D) or (B, N, D), to unit vectors (B, E)."""
        x = features[self.on]
        x = x if x.ndim == 2 else x.mean(1)  # (B, N, D) -> (B, D)
        return F.normalize(wide(self.project(x)), dim=-1)

    def embed_text(self, texts: list[str]) -> Tensor:
        """Captions to unit vectors (B, E)."""
        tokens = torch.stack([self.tokens(text) for text in texts])  # (B, L)
        return self.embed_ids(tokens)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Ids of captions (B, L), as :class:`vtp_core.nn.text.Tokens` makes them, to unit vectors (B, E)."""
        return F.normalize(wide(encode_text(self.text, ids.to(self.logit_scale.device))), dim=-1)
