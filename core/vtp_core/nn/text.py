"""Captions to features: open_clip's tokenizer and text tower, computing only what the last token reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 49408
_BYTES = 512  # every byte, alone and at the end of a word, stands before the merges
SMALLEST = _BYTES + 3


@functools.cache
def tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """CLIP's BPE with its first merges, so many that ``vocabulary`` entries result; built once a process.

    Merges are ordered by how early they were learnt, so the first ones are a BPE of their own.
    """
    from open_clip.tokenizer import SimpleTokenizer

    if not SMALLEST <= vocabulary <= VOCABULARY:
        raise ValueError(f"vocabulary: {vocabulary} is not within {SMALLEST} to {VOCABULARY}")
    made = SimpleTokenizer()
    if vocabulary < VOCABULARY:
        kept = [*list(made.encoder)[: vocabulary - 2], *list(made.encoder)[-2:]]
        made.encoder = {token: index for index, token in enumerate(kept)}
        made.decoder = dict(enumerate(kept))
        made.bpe_ranks = dict(list(made.bpe_ranks.items())[: vocabulary - 2 - _BYTES])
        made.all_special_ids = made.sot_token_id, made.eot_token_id = [vocabulary - 2, vocabulary - 1]
        made.vocab_size = vocabulary
    return made


@dataclass(frozen=True)
class Tokens:
    """The view that turns a caption into ids, zero after the end.

    Args:
        context: L, ids of a caption.
        vocabulary: entries of the BPE.
        field: raw field that is read.
    """

    context: int = 77
    vocabulary: int = VOCABULARY
    field: str = "text"
    crops: int | None = None

    def __call__(self, value: str) -> Tensor:
        """(L,) int64."""
        ids: Tensor = tokenizer(self.vocabulary)(value, self.context)[0]
        return ids


def build_tower(
    width: int,
    depth: int,
    heads: int,
    context: int,
    embedding: int,
    vocabulary: int,
    *,
    mlp_ratio: float = 4.0,
    layer_scale: float | None = None,
    quick_gelu: bool = False,
    projection_bias: bool = False,
) -> nn.Module:
    """open_clip's text transformer with its own key names, freshly drawn."""
    from open_clip.transformer import QuickGELU, TextTransformer

    tower: nn.Module = TextTransformer(
        context_length=context,
        vocab_size=vocabulary,
        width=width,
        heads=heads,
        layers=depth,
        output_dim=embedding,
        mlp_ratio=mlp_ratio,
        ls_init_value=layer_scale or None,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        proj_bias=projection_bias,
    )
    return tower


def encode_text(tower: Any, tokens: Tensor) -> Tensor:
    """What ``tower(tokens)`` gives, (B, L) -> (B, E), with less work.

    Attention is causal and only the end token is read: columns after the batch's last end are cut, and the
    last block asks for the end token's query alone.
    """
    ends = tokens.argmax(1)  # the end token has the largest id, (B,)
    length = tokens.shape[1] if tokens.is_meta else int(ends.max()) + 1  # a plan has no values
    x = tower.token_embedding(tokens[:, :length]) + tower.positional_embedding[:length]  # (B, L) -> (B, L, D)
    *blocks, last = tower.transformer.resblocks
    causal = tower.attn_mask[:length, :length]
    for block in blocks:
        x = block(x, attn_mask=causal)
    rows = torch.arange(len(ends), device=ends.device)
    keys = last.ln_1(x)
    later = torch.arange(length, device=ends.device) > ends[:, None]  # (B, L)
    query = keys[rows, ends][:, None]  # (B, 1, D)
    seen = last.attn(query, keys, keys, key_padding_mask=later, need_weights=False)[0]
    y = x[rows, ends] + last.ls_1(seen[:, 0])  # (B, D)
    y = tower.ln_final(y + last.ls_2(last.mlp(last.ln_2(y))))
    head = tower.text_projection
    pooled: Tensor = head(y) if isinstance(head, nn.Module) else y @ head  # (B, D) -> (B, E)
    return pooled
