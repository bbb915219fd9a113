"""VTP's step as papers and released code write it, with the engine's own weights: what ``step.py`` measures against.

Three trunk forwards (arXiv 2512.13687's code), every token in every block, logits as whole matrices, one sum of all
losses, one backward, AdamW and EMA parameter by parameter. Shares no code with vtp_core, only shapes of weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtp_core.build import Model

Pair = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight."""

    def __init__(self, weight: nn.Parameter, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def norm_of(like: Any) -> nn.Module:
    """The textbook norm with another's weights."""
    if isinstance(like, nn.LayerNorm):
        return copy.deepcopy(like)
    return RMSNorm(nn.Parameter(like.weight.detach().clone()))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of the last tokens of x (B, heads, T, d); tokens before them stay."""
    prefix = x.shape[2] - len(cos)
    still, moved = x[:, :, :prefix], x[:, :, prefix:]
    first, second = moved.chunk(2, dim=-1)
    return torch.cat([still, moved * cos + torch.cat([-second, first], dim=-1) * sin], dim=2)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, with the weights of one of vtp_core's blocks."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.heads = like.attn.heads
        self.norm1, self.norm2 = norm_of(like.norm1), norm_of(like.norm2)
        self.q_norm, self.k_norm = norm_of(like.attn.q_norm), norm_of(like.attn.k_norm)
        self.qkv, self.proj = copy.deepcopy(like.attn.qkv), copy.deepcopy(like.attn.proj)
        self.w1, self.w2, self.w3 = (copy.deepcopy(getattr(like.mlp, name)) for name in ("w1", "w2", "w3"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # -> (B, heads, T, d)
        q, k = rotated(self.q_norm(q), cos, sin), rotated(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.proj(y)
        y = self.norm2(x)
        out: Tensor = x + self.w3(F.silu(self.w1(y)) * self.w2(y))
        return out


class Trunk(nn.Module):
    """The encoder; rotary tables are computed in every forward."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.patch, self.periods = like.patch[0], like.rope.periods
        self.embed = nn.Conv2d(3, like.width, self.patch, self.patch)
        linear = like.patch_embed.proj
        self.embed.load_state_dict({"weight": linear.weight.view_as(self.embed.weight), "bias": linear.bias})
        self.cls_token, self.mask_token = copy.deepcopy(like.cls_token), copy.deepcopy(like.mask_token)
        self.blocks = nn.ModuleList(Block(block) for block in like.blocks)
        self.norm = norm_of(like.norm)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Pair:
        tokens = self.embed(x)  # -> (B, D, h, w)
        grid, tokens = tuple(tokens.shape[2:]), tokens.flatten(2).transpose(1, 2)  # -> (B, N, D)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token, tokens)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        cos, sin = tables(grid, self.periods)
        for block in self.blocks:
            tokens = block(tokens, cos, sin)
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]


def tables(grid: tuple[int, ...], periods: Tensor) -> Pair:
    """Cosines and sines of a grid's rotary angles, (N, d)."""
    sides = [2 * (torch.arange(0.5, side, dtype=torch.float64) / side) - 1 for side in grid]
    coords = torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, -2)  # (N, axes)
    angles = (2 * torch.pi * coords[:, :, None] / periods).flatten(1).tile(2)  # -> (N, d)
    return angles.cos().float(), angles.sin().float()


class Pixels(nn.Module):
    """The decoder, from tokens (B, N, C) of a square grid."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.patch, self.periods = like.patch[0], like.rope.periods
        self.proj_in, self.proj_out = copy.deepcopy(like.proj_in), copy.deepcopy(like.proj_out)
        self.blocks = nn.ModuleList(Block(block) for block in like.blocks)
        self.norm = norm_of(like.norm)

    def forward(self, z: Tensor) -> Tensor:
        side = int(z.shape[1] ** 0.5)
        x, (cos, sin) = self.proj_in(z), tables((side, side), self.periods)
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.proj_out(self.norm(x)).transpose(1, 2).unflatten(2, (side, side))  # -> (B, ch * P, h, w)
        return F.pixel_shuffle(x, self.patch)


def lpips_of(perceptual: Any) -> Any:
    """The lpips package's own module with the same trunk and heads."""
    import lpips

    made = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    for index, (part, head) in enumerate(zip(perceptual.slices, perceptual.heads, strict=True)):
        getattr(made.net, f"slice{index + 1}").load_state_dict(part.state_dict())
        made.lins[index].model[1].load_state_dict({"weight": head.view(1, -1, 1, 1)})
    return made.requires_grad_(False).eval()


class Textbook(nn.Module):
    """All that trains, and its EMA teacher."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        named: dict[str, Any] = dict(model.objectives)
        clip, dino, ibot = named["clip"], named["dino"], named["ibot"]
        assert model.bottleneck is not None
        self.trunk, self.decoder = Trunk(model.encoder), Pixels(model.decoder)
        self.bottleneck, self.text = copy.deepcopy(model.bottleneck.links[0]), copy.deepcopy(clip.text)
        self.project, self.logit_scale = copy.deepcopy(clip.project), copy.deepcopy(clip.logit_scale)
        self.dino_head, self.ibot_head = copy.deepcopy(dino.head), copy.deepcopy(ibot.head)
        followed = (self.trunk, self.dino_head, self.ibot_head)
        self.teacher = nn.ModuleList(copy.deepcopy(m) for m in followed).requires_grad_(False)
        self.lpips = lpips_of(named["reconstruction"].perceptual)
