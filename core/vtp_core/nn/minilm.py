"""all-MiniLM-L6-v2 (arXiv 2002.10957, 1908.10084): texts to unit vectors; a frozen BERT of six layers and its mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core import weights
from vtp_core.converting.files import read, state_dict
from vtp_core.errors import PluginFault
from vtp_plugins.importing import Mismatch, check_tensors

TOKENIZER = ".tokenizer.json"
LONGEST = 256  # tokens that it was trained on; longer texts are cut
EPS = 1e-12
_LAYER = {
    "self_attn.in_proj": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "self_attn.out_proj": ("attention.output.dense",),
    "norm1": ("attention.output.LayerNorm",),
    "linear1": ("intermediate.dense",),
    "linear2": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}
"""Our name -> theirs, of what a layer has; the rows of several of theirs lie below each other in ours."""
_OUTER = {"norm": "embeddings.LayerNorm"}
_TABLES = {"words": "word_embeddings", "places": "position_embeddings", "kinds": "token_type_embeddings"}
_UNREAD = ("pooler.", "embeddings.position_ids")


class Bert(nn.Module):
    """The network, as BERT is: post-norm layers over the sum of three embeddings.

    Args:
        width: D.
        depth: layers.
        heads: attention heads.
        hidden: width of the feed-forward.
        vocabulary: tokens.
        context: places.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        vocabulary: int = 30522,
        context: int = 512,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.kinds, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, EPS)
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", layer_norm_eps=EPS, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean of the last layer over the tokens of each text, not normalised.

        Args:
            ids: (B, L).
            mask: (B, L) bool, true where a token is.

        Returns:
            (B, D).
        """
        x = self.norm(
            self.words(ids) + self.places.weight[: ids.shape[1]] + self.kinds.weight[0]
        )  # (B, L, D)
        x = self.layers(x, src_key_padding_mask=~mask)
        share = mask[..., None].to(x.dtype)
        pooled: Tensor = (x * share).sum(1) / share.sum(1)  # (B, L, D) -> (B, D)
        return pooled

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill it with a state dict in the layout of ``transformers``.

        Raises:
            Mismatch: it is another network's.
        """
        given = {k: v for k, v in tensors.items() if not k.startswith(_UNREAD)}
        own, names = self.state_dict(), self._names()
        check_tensors(
            {name: tuple(tensor.shape) for name, tensor in given.items()},
            {
                name: (own[ours].shape[0] // len(theirs), *own[ours].shape[1:])
                for ours, theirs in names.items()
                for name in theirs
            },
        )
        self.load_state_dict({ours: torch.cat([given[n] for n in theirs]) for ours, theirs in names.items()})

    def _names(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        found |= {f"{ours}.weight": (f"embeddings.{theirs}.weight",) for ours, theirs in _TABLES.items()}
        for kind in ("weight", "bias"):
            found |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in _OUTER.items()}
            for index in range(len(self.layers.layers)):
                for ours, theirs in _LAYER.items():
                    joint = "_" if ours.endswith("in_proj") else "."  # torch's own name of the three
                    found[f"layers.layers.{index}.{ours}{joint}{kind}"] = tuple(
                        f"encoder.layer.{index}.{name}.{kind}" for name in theirs
                    )
        return found


class MiniLM(nn.Module):
    """The frozen text encoder, from the files that ``vtp weights import minilm`` brought.

    Attributes:
        width: E of its embeddings.

    Raises:
        DataFault: the files are not here.
        PluginFault: the package ``tokenizers`` is not installed.
    """

    width = 384

    def __init__(self) -> None:
        super().__init__()
        file = weights.path("minilm")
        self.tokenizer = _tokenizer(weights.beside("minilm", TOKENIZER))
        self.network = Bert(self.width)
        try:
            self.network.load(state_dict(read(file), file).tensors)
        except Mismatch as error:
            raise Mismatch(f"{file} holds other weights than MiniLM's\n{error}") from error
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MiniLM:
        """It stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Texts to unit vectors (B, 384), whatever else is in the batch."""
        found = self.tokenizer.encode_batch(list(texts))
        device = self.network.kinds.weight.device
        ids = torch.tensor([one.ids for one in found], device=device)  # (B, L)
        mask = torch.tensor([one.attention_mask for one in found], device=device).bool()
        return F.normalize(self.network(ids, mask), dim=-1)


def _tokenizer(file: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PluginFault(
            "MiniLM reads texts with the package tokenizers: pip install 'vtp-plugins[text]'"
        ) from error
    made = Tokenizer.from_file(str(file))
    made.enable_truncation(LONGEST)
    made.enable_padding()
    return made
