"""Tiny towers under published names, and the features of an encoder that an importer described."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtp_core.modalities import Image
from vtp_core.models.rope import Rope
from vtp_plugins import Spec

WIDTH, DEPTH, HIDDEN, PATCH, SIDE = 32, 2, 48, 4, 16
CELLS = (SIDE // PATCH) ** 2


def linear(name: str, out: int, into: int = WIDTH, bias: bool = True) -> dict[str, Tensor]:
    found = {f"{name}.weight": torch.randn(out, into) / into**0.5}
    return found | ({f"{name}.bias": 0.1 * torch.randn(out)} if bias else {})


def norm(name: str, width: int = WIDTH) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


def meta(
    registers: int = 0, gated: bool = False, three: bool = False, biased: bool = True
) -> dict[str, Tensor]:
    """A tower as Meta's repositories name it, written down by hand; ``three`` is DINOv3."""
    t = {"cls_token": torch.randn(1, 1, WIDTH), "mask_token": torch.zeros(1, WIDTH)}
    t["patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH) / 7
    t |= {"patch_embed.proj.bias": torch.randn(WIDTH)} | norm("norm")
    if registers:
        t["storage_tokens" if three else "register_tokens"] = torch.randn(1, registers, WIDTH)
    if three:
        t["rope_embed.periods"] = Rope(WIDTH // 4, 2).periods.bfloat16().float()
    else:
        t["pos_embed"] = torch.randn(1, 1 + CELLS, WIDTH)
    for at in (f"blocks.{index}." for index in range(DEPTH)):
        t |= norm(f"{at}norm1") | norm(f"{at}norm2") | linear(f"{at}attn.proj", WIDTH)
        t |= linear(f"{at}attn.qkv", 3 * WIDTH, bias=biased)
        t |= {f"{at}ls1.gamma": torch.randn(WIDTH), f"{at}ls2.gamma": torch.randn(WIDTH)}
        if three and biased:
            t[f"{at}attn.qkv.bias"][WIDTH : 2 * WIDTH] = 0
            t[f"{at}attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(WIDTH)
        if gated and three:
            t |= (
                linear(f"{at}mlp.w1", HIDDEN)
                | linear(f"{at}mlp.w2", HIDDEN)
                | linear(f"{at}mlp.w3", WIDTH, HIDDEN)
            )
        elif gated:
            t |= linear(f"{at}mlp.w12", 2 * HIDDEN) | linear(f"{at}mlp.w3", WIDTH, HIDDEN)
        else:
            t |= linear(f"{at}mlp.fc1", HIDDEN) | linear(f"{at}mlp.fc2", WIDTH, HIDDEN)
    return t


def features(sections: Any, tensors: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """Of the encoder that an importer described."""
    from vtp_vfm import Timm

    node = {k: v for k, v in sections["encoder"].items() if k not in {"use", "frozen"}}
    encoder = Timm(Spec(size=(0, 0)), **node).eval()
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in tensors.items()})
    with torch.no_grad():
        return encoder(Image().normalise(images))


def normalised(images: Tensor) -> Tensor:
    """By ImageNet's mean and deviation, which timm's configuration of DINO names."""
    return Image().normalise(images)


def close(ours: dict[str, Tensor], tokens: Tensor, prefix: int) -> None:
    torch.testing.assert_close(ours["cls"], tokens[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["patches"], tokens[:, prefix:], rtol=1e-4, atol=1e-4)


TWO = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "img_size": SIDE}
