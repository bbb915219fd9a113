"""The stack that a VTP directory is: our modules with the options that its config asks for. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtp_core.errors import DataFault
from vtp_core.official.config import PATCH, Config, read_config

_WORDS = 515  # of the smallest BPE: every byte, alone and at the end of a word, the two ends, one merge
_DIALS = {(384, 12): "s", (768, 12): "b", (1024, 24): "l"}


def official_tree(path: Path) -> dict[str, Any]:
    """The tree of a stack for a VTP directory; it names no data and trains nothing.

    Its CLIP tower is under ``tokenizer.exports``, as one that travels with a tokenizer.

    Raises:
        DataFault: the config is broken, or asks for what cannot be computed.
    """
    return tree_of(read_config(path), path)


def tree_of(config: Config, path: Path) -> dict[str, Any]:
    """The tree for a config; ``path`` is named in messages."""
    _check(config, path)
    dial = _DIALS.get((config.vision_embed_dim, config.vision_depth), "tiny")
    tree: dict[str, Any] = {"modality": "image", "size": dial, "encoder": encoder_of(config)}
    if config.bottleneck:
        tree["bottleneck"] = {"use": "linear", "channels": config.vision_feature_bottleneck}
    if config.train_reconstruction:
        tree["decoder"] = decoder_of(config)
    if config.train_clip:
        tree["tokenizer"] = {"exports": {"clip": clip_of(config)}}
    return tree


def encoder_of(config: Config) -> dict[str, Any]:
    """Node of the encoder."""
    return {
        "use": "vit",
        "patch": config.vision_patch_size,
        "image_size": config.image_size,
        "width": config.vision_embed_dim,
        "depth": config.vision_depth,
        "heads": config.vision_num_heads,
        "mlp_ratio": config.vision_mlp_ratio,
        "ffn": config.vision_ffn_layer,
        "norm": config.vision_norm_layer,
        "qk_norm": config.vision_use_qk_norm,
        "layer_scale": config.vision_init_values or None,
        "rope_dtype": config.rope_dtype,
    }


def decoder_of(config: Config) -> dict[str, Any]:
    """Node of the decoder."""
    return {
        "use": "vit_pixels",
        "width": config.decoder_embed_dim,
        "depth": config.decoder_depth,
        "heads": config.decoder_num_heads,
        "ffn": config.decoder_ffn_layer,
        "norm": config.decoder_norm_layer,
        "qk_norm": config.decoder_use_qk_norm,
        "layer_scale": config.decoder_init_values or None,
        "rope_dtype": config.rope_dtype,
    }


ON = {
    ("cls", True): "cls",
    ("cls", False): "latent.cls",
    ("pooled", True): "patches",
    ("pooled", False): "latent",
}
"""``vision_clip_feat`` and ``vision_bottleneck_ae_only`` -> what the CLIP objective reads."""


def clip_of(config: Config) -> dict[str, Any]:
    """Node of the CLIP objective; a bias of the logits means the sigmoid loss.

    A tower with fewer words than bytes has no tokenizer: weight 0 says that nothing is to be trained with it.
    """
    return {
        **({} if config.text_vocab_size >= _WORDS else {"weight": 0.0}),
        "on": ON[config.vision_clip_feat, config.vision_bottleneck_ae_only],
        "loss": "softmax" if config.init_logit_bias is None else "sigmoid",
        "width": config.text_embed_dim,
        "depth": config.text_depth,
        "heads": config.text_num_heads,
        "context": config.text_context_length,
        "embedding": config.text_embed_dim,
        "vocabulary": config.text_vocab_size,
        "mlp_ratio": config.text_mlp_ratio,
        "layer_scale": config.text_ls_init_value or None,
        "quick_gelu": config.text_quick_gelu,
        "projection_bias": config.text_proj_bias,
    }


def _check(config: Config, path: Path) -> None:
    """What the fields forbid together."""
    wrong = []
    if config.image_size % config.vision_patch_size:
        wrong.append(f"image_size {config.image_size} is no multiple of vision_patch_size")
    if config.train_reconstruction and config.vision_patch_size != PATCH:
        wrong.append(
            f"vision_patch_size {config.vision_patch_size}: the release's decoder draws {PATCH} pixels a token"
        )
    towers = [
        ("vision", 4, True),
        ("decoder", 4, config.train_reconstruction),
        ("text", 1, config.train_clip),
    ]
    for tower, unit, there in towers:
        width, heads = getattr(config, f"{tower}_embed_dim"), getattr(config, f"{tower}_num_heads")
        if there and (width % heads or (width // heads) % unit):
            wrong.append(f"{tower}_num_heads {heads} and {tower}_embed_dim {width} do not go together")
    if wrong:
        raise DataFault(f"{path / 'config.json'}: " + "; ".join(wrong))
