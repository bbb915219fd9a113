"""Frozen networks whose features critics read: they resize and normalise, and pass gradient to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core import weights
from vtp_core.errors import DataFault, suggestion
from vtp_core.modalities import MEAN, STD
from vtp_core.nn import lite0


class Backbone(nn.Module):
    """A frozen network and the blocks whose tokens are handed out.

    Args:
        network: that is read; it never leaves eval mode.
        taps: blocks, 1 is the first; a block may be named twice.
        widths: D of each block of the network, the first one first.
        side: that pictures are resized to, bilinearly; None leaves them.

    Attributes:
        widths: D of each tap.

    Raises:
        ValueError: a tap that the network lacks.
    """

    def __init__(
        self, network: nn.Module, taps: Sequence[int], widths: Sequence[int], side: int | None
    ) -> None:
        super().__init__()
        if not taps or not all(1 <= tap <= len(widths) for tap in taps):
            raise ValueError(f"taps: blocks are 1 to {len(widths)}, not {list(taps)}")
        self.network = network.eval().requires_grad_(False)
        self.taps, self.side = tuple(taps), side
        self.widths = tuple(widths[tap - 1] for tap in taps)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] to the taps' tokens, (B, D, N) each, rows first.

        Whatever their dtype, features have it too, and gradient reaches x, also a second one.
        """
        if self.side is not None and x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        blocks = self.blocks(x)
        return [blocks[tap] for tap in self.taps]

    def blocks(self, x: Tensor) -> dict[int, Tensor]:
        """Tokens of at least the blocks in ``taps``, (B, D, N), by block."""
        raise NotImplementedError


class ViT(Backbone):
    """One of timm's vision transformers; tokens leave a block as they are, without the final norm.

    Args:
        network: ``timm``'s; its attention is made explicit, since fused kernels know no second gradient.
        taps: blocks, 1 is the first.
        side: of the square that it reads; by default its own.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: Any, taps: Sequence[int], side: int | None = None) -> None:
        depth, width = len(network.blocks), network.embed_dim
        super().__init__(network, taps, [width] * depth, side or network.patch_embed.img_size[0])
        for block in network.blocks:
            block.attn.fused_attn = False
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def blocks(self, x: Tensor) -> dict[int, Tensor]:
        wanted = sorted(set(self.taps))
        network: Any = self.network
        found = network.forward_intermediates(
            x * self.scale + self.shift,
            indices=[tap - 1 for tap in wanted],
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return {tap: tokens.transpose(1, 2) for tap, tokens in zip(wanted, found, strict=True)}


class Lite0(Backbone):
    """EfficientNet-Lite0; taps are the maps after its blocks, flattened.

    Args:
        network: with weights.
        taps: blocks, 1 to 16.
        side: of the square that it reads.
    """

    def __init__(self, network: lite0.Lite0, taps: Sequence[int], side: int | None = None) -> None:
        widths = [channels for repeats, *_, channels in lite0._STAGES for _ in range(repeats)]
        super().__init__(network, taps, widths, side)

    def blocks(self, x: Tensor) -> dict[int, Tensor]:
        network: Any = self.network
        x = ((x + 1) * 127.5 - 127) / 128  # as the network was trained on 0..255
        x = F.relu6(network._bn0(network._conv_stem(x.contiguous(memory_format=torch.channels_last))))
        found = {}
        for index, block in enumerate(network._blocks[: max(self.taps)], 1):
            x = block(x)
            found[index] = x.flatten(2)  # (B, D, h, w) -> (B, D, N)
        return found


@dataclass(frozen=True, slots=True)
class _Known:
    """A vision transformer by its name in timm, and where people get its weights."""

    timm: str
    source: str


_DINO = "https://dl.fbaipublicfiles.com/dino"
_VITS = {
    "dino_s8": _Known(
        "vit_small_patch8_224", f"{_DINO}/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    ),
    "dino_s16": _Known(
        "vit_small_patch16_224", f"{_DINO}/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
    ),
    "dino_b8": _Known("vit_base_patch8_224", f"{_DINO}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "dino_b16": _Known(
        "vit_base_patch16_224", f"{_DINO}/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    ),
    "dinov2_s14": _Known("vit_small_patch14_dinov2", f"{_DINO}v2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_b14": _Known("vit_base_patch14_dinov2", f"{_DINO}v2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
}
VIT_TAPS = (12, 3, 6, 9, 12)  # the last block first, and again as a quarter (RAE)
VIT_SIDE = 224
LITE0_TAPS = (3, 5, 11)
NAMES = ("lite0", *_VITS, "random")


def backbone(
    name: str,
    *,
    taps: Sequence[int] = (),
    side: int | None = None,
    file: str | Path | None = None,
    allow_random: bool = False,
) -> Backbone:
    """A frozen network by name.

    Args:
        name: one of ``NAMES``; ``random`` is a tiny vision transformer without meaning.
        taps: blocks, 1 is the first; by default what suits the network.
        side: that pictures are resized to; by default 224 for a vision transformer, as they are for ``lite0``.
        file: weights; by default ``$VTP_HOME/weights/<name>.safetensors``.
        allow_random: says that this is a test.

    Raises:
        ValueError: an unknown name, a tap that the network lacks, ``random`` without its permission.
        DataFault: weights are not there or are another network's.
    """
    if name not in NAMES:
        raise ValueError(f"backbone: no {name!r}{suggestion(name, NAMES)}")
    with torch.random.fork_rng(devices=[]):  # networks draw weights that are then replaced
        if name == "lite0":
            path = weights.path("lite0") if file is None else _file(name, Path(file), "")
            return Lite0(_lite0(path), taps or LITE0_TAPS, side)
        if name == "random":
            if not allow_random:
                raise ValueError(
                    "backbone: random means nothing; for a test, set allow_random_backbone: true"
                )
            torch.manual_seed(0)
            return ViT(tiny(), taps or (2, 1, 2), side)
        return _vit(name, taps or VIT_TAPS, side or VIT_SIDE, file)


def _lite0(path: Path) -> lite0.Lite0:
    with torch.device("meta"):
        network = lite0.Lite0()
    try:
        network.load_state_dict(_tensors(path), assign=True)
    except RuntimeError as error:
        raise DataFault(f"{path} is no state dict of EfficientNet-Lite0: {error}") from error
    return network.to(memory_format=torch.channels_last)


def tiny(**shape: Any) -> nn.Module:
    """A vision transformer of any shape with random weights; tests of critics know its values."""
    from timm.models.vision_transformer import VisionTransformer

    own = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    network: nn.Module = VisionTransformer(**{**own, **shape}, num_classes=0, act_layer=_GELU)
    return network


_GELU = partial(nn.GELU, approximate="tanh")  # as RAE runs DINO


def _vit(name: str, taps: Sequence[int], side: int, file: str | Path | None) -> ViT:
    import timm

    known = _VITS[name]
    place = weights.home() / f"{name}.safetensors" if file is None else Path(file)
    tensors = _tensors(_file(name, place, known.source))
    with torch.device("meta"):
        network: Any = timm.create_model(
            known.timm, pretrained=False, num_classes=0, img_size=side, act_layer=_GELU
        )
    load(network, tensors, str(place))
    return ViT(network, taps, side)


def load(network: Any, tensors: dict[str, Tensor], where: str) -> None:
    """Fill one of timm's vision transformers; position embeddings are resized where its side is another.

    Raises:
        DataFault: the tensors are another network's.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = network.state_dict()
    fitted = checkpoint_filter_fn(dict(tensors), network)
    wrong = [k for k, v in own.items() if k not in fitted or fitted[k].shape != v.shape]
    if wrong:
        raise DataFault(f"{where} is no state dict of this network: {', '.join(wrong[:4])} lack or differ")
    network.load_state_dict({key: fitted[key] for key in own}, assign=True)


def _file(name: str, place: Path, source: str) -> Path:
    place = place.expanduser()
    if not place.is_file():
        fetch = f", from {source}," if source else ""
        raise DataFault(
            f"backbone {name!r}: no weights at {place}. Put its state dict{fetch} there, as safetensors, or "
            "name a .safetensors or .pth file under `weights`"
        )
    return place


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        return dict(found.get("model", found))
    except Exception as error:
        raise DataFault(f"{path} is no file of weights: {error}") from error
