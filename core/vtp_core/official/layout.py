"""Names, shapes and dtypes of the release's tensors, from the config alone (specs/vtp.md 2)."""

from __future__ import annotations

from collections.abc import Iterator

from vtp_core.official.config import MLP_RATIO, PATCH, Config

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
CHANNELS = 3
PERIODS = "rope_embed.periods"
"""End of the names of the rotary tables' periods, constants that are stored in bfloat16."""


def shapes(config: Config) -> Shapes:
    """Every tensor of a release with this config: all float32 but :data:`PERIODS`."""
    found = dict(_trunk(config))
    if config.train_clip:
        found |= _clip(config)
    if config.train_reconstruction:
        found |= dict(_decoder(config))
    return found


def hidden(width: int, ratio: float, ffn: str) -> int:
    """Hidden width of a feed-forward: SwiGLU's is two thirds, rounded up."""
    if ffn == "mlp":
        return int(width * ratio)
    align = int(ffn.removeprefix("swiglu") or 8)
    return -(-int(int(width * ratio) * 2 / 3) // align) * align


def _trunk(config: Config) -> Iterator[tuple[str, Shape]]:
    width, patch = config.vision_embed_dim, config.vision_patch_size
    yield "trunk.cls_token", (1, 1, width)
    yield "trunk.mask_token", (1, width)
    yield "trunk.patch_embed.proj.weight", (width, CHANNELS, patch, patch)
    yield "trunk.patch_embed.proj.bias", (width,)
    yield f"trunk.{PERIODS}", (width // config.vision_num_heads // 4,)
    for index in range(config.vision_depth):
        yield from _block(
            f"trunk.blocks.{index}.",
            width,
            config.vision_num_heads,
            (config.vision_ffn_layer, hidden(width, config.vision_mlp_ratio, config.vision_ffn_layer)),
            config.vision_norm_layer,
            config.vision_use_qk_norm,
            bool(config.vision_init_values),
        )
    yield from _norm("trunk.norm.", width, config.vision_norm_layer)
    if config.bottleneck:
        yield "trunk.feature_bottleneck.weight", (config.vision_feature_bottleneck, width)


def _decoder(config: Config) -> Iterator[tuple[str, Shape]]:
    width, pixels = config.decoder_embed_dim, CHANNELS * PATCH**2
    yield "pixel_decoder.proj_in.weight", (width, config.vision_feature_bottleneck, 1, 1)
    yield "pixel_decoder.proj_in.bias", (width,)
    yield f"pixel_decoder.{PERIODS}", (width // config.decoder_num_heads // 4,)
    for index in range(config.decoder_depth):
        yield from _block(
            f"pixel_decoder.blocks.{index}.",
            width,
            config.decoder_num_heads,
            (config.decoder_ffn_layer, hidden(width, MLP_RATIO, config.decoder_ffn_layer)),
            config.decoder_norm_layer,
            config.decoder_use_qk_norm,
            bool(config.decoder_init_values),
        )
    yield from _norm("pixel_decoder.norm.", width, config.decoder_norm_layer)
    yield "pixel_decoder.proj_out.weight", (pixels, width, 1, 1)
    yield "pixel_decoder.proj_out.bias", (pixels,)


def _block(
    at: str, width: int, heads: int, ffn: tuple[str, int], norm: str, qk_norm: bool, scaled: bool
) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{at}norm1.", width, norm)
    yield from _linear(f"{at}attn.qkv.", width, 3 * width)
    if qk_norm:
        yield f"{at}attn.q_norm.weight", (width // heads,)
        yield f"{at}attn.k_norm.weight", (width // heads,)
    yield from _linear(f"{at}attn.proj.", width, width)
    yield from _norm(f"{at}norm2.", width, norm)
    kind, inner = ffn
    into, out = (("fc1",), "fc2") if kind == "mlp" else (("w1", "w2"), "w3")
    for name in into:
        yield from _linear(f"{at}mlp.{name}.", width, inner)
    yield from _linear(f"{at}mlp.{out}.", inner, width)
    if scaled:
        yield f"{at}ls1.gamma", (width,)
        yield f"{at}ls2.gamma", (width,)


def _linear(at: str, into: int, out: int) -> Iterator[tuple[str, Shape]]:
    yield f"{at}weight", (out, into)
    yield f"{at}bias", (out,)


def _norm(at: str, width: int, kind: str = "layernorm") -> Iterator[tuple[str, Shape]]:
    yield f"{at}weight", (width,)
    if kind != "rmsnorm":
        yield f"{at}bias", (width,)


def _clip(config: Config) -> Shapes:
    """The text tower, both projections, scale and bias of the logits."""
    width, scalar = config.text_embed_dim, (1,) if config.nonscalar_logit_scale else ()
    found: Shapes = {
        "positional_embedding": (config.text_context_length, width),
        "token_embedding.weight": (config.text_vocab_size, width),
        "visual_proj.weight": (width, config.joint_width),
        "logit_scale": scalar,
    }
    if config.init_logit_bias is not None:
        found["logit_bias"] = scalar
    if config.text_proj_bias:
        found |= dict(_linear("text_projection.", width, width))
    else:
        found["text_projection"] = (width, width)
    for index in range(config.text_depth):
        found |= dict(_resblock(f"text_transformer.resblocks.{index}.", config))
    return found | dict(_norm("ln_final.", width))


def _resblock(at: str, config: Config) -> Iterator[tuple[str, Shape]]:
    width, inner = config.text_embed_dim, int(config.text_embed_dim * config.text_mlp_ratio)
    yield from _norm(f"{at}ln_1.", width)
    yield f"{at}attn.in_proj_weight", (3 * width, width)
    yield f"{at}attn.in_proj_bias", (3 * width,)
    yield from _linear(f"{at}attn.out_proj.", width, width)
    yield from _norm(f"{at}ln_2.", width)
    yield from _linear(f"{at}mlp.c_fc.", width, inner)
    yield from _linear(f"{at}mlp.c_proj.", inner, width)
    if config.text_ls_init_value:
        yield f"{at}ls_1.gamma", (width,)
        yield f"{at}ls_2.gamma", (width,)
