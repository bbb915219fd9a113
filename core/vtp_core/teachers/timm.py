"""Any model of timm as a teacher (DINOv2, MAE, SigLIP, CNNs); its weights are a file on this machine."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtp_core.errors import StackFault
from vtp_core.teachers.frozen import (
    Frozen,
    Interpolation,
    Normalise,
    check_size,
    constants,
    file_of,
    hidden_levels,
    load_into,
)
from vtp_plugins.errors import suggestion
from vtp_plugins.spec import Spec


class Timm(Frozen):
    """``patches`` after the final norm without prefix tokens; ``cls``, the class token or else their mean.

    The position table of a ViT is resampled to the size it reads.

    Args:
        spec: tells the tokenizer's patch.
        name: timm's name of the model, with or without the tag of its weights.
        weights: a file (safetensors or a state dict with timm's keys); None is the one that
            ``vtp weights import <name>`` put into ``$VTP_HOME/timm``; ``random`` is for tests.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has, or
            the model's own size where it takes no other.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks.
        normalise: ``own`` takes the mean and deviation of timm's data config out, ``signed`` makes [-1, 1] of
            pictures (what VA-VAE feeds DINOv2), ``none`` leaves [0, 1].
        allow_random: says that this is a test.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        name: str,
        weights: str | None = None,
        size: int | tuple[int, int] | None = None,
        interpolation: Interpolation = "bicubic",
        antialias: bool = False,
        normalise: Normalise = "own",
        allow_random: bool = False,
    ) -> None:
        import timm

        if not timm.is_model(name):
            raise ValueError(f"name: timm has no model {name!r}{suggestion(name, _near(name))}")
        file = file_of("timm", name, weights, allow_random)
        network, flexible = _network(name)
        config = _config(network)
        if size is None and not flexible:
            size = (config["input_size"][1], config["input_size"][2])
        if _patch(network):
            check_size(size, _patch(network))
        mean, deviation = constants(normalise, (config["mean"], config["std"]))
        reduction = int(network.feature_info[-1]["reduction"])
        super().__init__(
            spec, width=int(network.num_features), stride=(reduction, reduction), size=size,
            interpolation=interpolation, antialias=antialias, mean=mean, deviation=deviation,
        )  # fmt: skip
        if file is not None:
            heads = network.pretrained_cfg.get("classifier") or ()
            load_into(network, file, [f"{h}." for h in ((heads,) if isinstance(heads, str) else heads)])
        self.network = network
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))
        self.has_cls = self.prefix > 0 and getattr(network, "cls_token", None) is not None
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.requires_grad_(False).eval()

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        return () if options["weights"] == "random" else (options["name"],)

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """``patches`` (B, N, D), ``cls`` (B, D) and, of a ViT, ``hidden:k``."""
        levels = hidden_levels(want)
        out: dict[str, Tensor] = {}
        if levels:
            final, out = self._with_hidden(x, levels)
        else:
            final = self.network.forward_features(x)
        if final.ndim == 4:
            final = final if self.channels_last else final.permute(0, 2, 3, 1)  # (B, D, h, w) -> (B, h, w, D)
            patches = final.flatten(1, 2)  # -> (B, N, D)
        else:
            patches = final[:, self.prefix :]
        return out | {"patches": patches, "cls": final[:, 0] if self.has_cls else patches.mean(1)}

    def _with_hidden(self, x: Tensor, levels: Mapping[str, int]) -> tuple[Tensor, dict[str, Tensor]]:
        depth = len(self.network.blocks) if _patch(self.network) == self.stride[0] else 0
        for name, level in levels.items():
            if not 1 <= level <= depth:
                known = f"hidden:k has k from 1 to {depth}" if depth else "hidden:k is a ViT's"
                raise StackFault(f"timm teacher: no {name!r}; {known}")
        blocks = sorted(set(levels.values()))
        final, middle = self.network.forward_intermediates(
            x, indices=[level - 1 for level in blocks], norm=False, output_fmt="NLC"
        )
        return final, {name: middle[blocks.index(level)] for name, level in levels.items()}


def _network(name: str) -> tuple[Any, bool]:
    """The model without its classifier, and whether it reads pictures of any size."""
    import timm

    try:
        with torch.device("meta"):
            shape = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"name: {error}") from error
    known = inspect.signature(type(shape).__init__).parameters
    keys: dict[str, Any] = {"dynamic_img_size": True} if "dynamic_img_size" in known else {}
    network = timm.create_model(name, pretrained=False, num_classes=0, **keys)
    return network, bool(keys) or "img_size" not in known


def _patch(network: Any) -> int:
    """Pixels of a patch of a ViT, whose tokens keep that stride to its end; 0 of other networks."""
    if not hasattr(network, "blocks") or not hasattr(network, "patch_embed"):
        return 0
    return int(network.patch_embed.patch_size[0])


def _config(network: Any) -> dict[str, Any]:
    """What timm knows of a model's input: size, mean, deviation."""
    from timm.data.config import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(network)
    return found


def _near(name: str) -> list[str]:
    import timm

    return [n for n in timm.list_models() if n[:4] == name[:4]] or ["vit_base_patch14_dinov2"]
