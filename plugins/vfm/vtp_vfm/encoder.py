"""Any network of timm as an encoder: DINOv2, SigLIP 2, MAE, CNNs; frozen as RAE's, or trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vtp_core.teachers.frozen import Interpolation, Normalise, constants
from vtp_plugins.clock import Clock
from vtp_plugins.spec import Spec
from vtp_vfm.backbone import Filled, backbone, constants_of, fill, patch_of
from vtp_vfm.ranges import Range, check_pictures

Count = Annotated[int, Field(gt=0)]


class Timm(Filled):
    """A foreign network over pictures that are resized so that one of its tokens is one of ours.

    Outputs: ``patches`` after the final norm without class and register tokens; ``cls``, the class token or
    else their mean; ``hidden:k`` of a ViT, after block k. It masks nothing and drops nothing.

    Args:
        spec: modality of the signal.
        name: timm's name, with or without the tag of its weights, which also tells mean and deviation.
        weights: a file (safetensors or a state dict with timm's keys); None is the one that
            ``vtp weights import <name>`` brought; ``random`` begins anew; ``checkpoint`` waits for those of a run.
        patch: pixels of a picture that make a token; None takes the network's own. RAE's DINOv2 reads pictures
            of 256 at 224: patch 16 on a network of 14.
        image_size: size of the picture in training, one number or (H, W).
        affine: false takes weight and bias off the final norm (RAE, arXiv 2510.11690).
        normalise: ``own`` mean and deviation by timm's data config, ``signed`` [-1, 1] or ``none`` [0, 1].
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks; published code doesn't.
        eps: of every layer norm; None leaves timm's. The MAE of transformers has 1e-12.
        arguments: of timm's constructor, for sizes without a name.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        name: str,
        weights: str | None = None,
        patch: Count | None = None,
        image_size: Count | tuple[Count, Count] = 224,
        affine: bool = True,
        normalise: Normalise = "own",
        interpolation: Interpolation = "bicubic",
        antialias: bool = False,
        eps: Annotated[float, Field(gt=0)] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_pictures(spec)
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        network = backbone(name, arguments or {}, None)
        own = patch_of(network)
        self.stride = own or int(network.feature_info[-1]["reduction"])
        self.patch = (patch or self.stride,) * 2
        if not own and not hasattr(network, "forward_features"):
            raise ValueError(f"name: {name} gives no map of features")
        read = self.read_size(self.size)
        if own and not getattr(network, "dynamic_img_size", False):
            network = backbone(name, arguments or {}, read)
        self.lack(network, name, weights)
        _trim(network, name, affine, eps)
        self.network = network
        self.width, self.depth = int(network.num_features), len(network.blocks) if own else 0
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))
        self.has_cls = self.prefix > 0 and getattr(network, "cls_token", None) is not None
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.range = Range(*constants(normalise, constants_of(network)))
        self.interpolation, self.antialias = interpolation, antialias

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        return () if options["weights"] == "random" else (options["name"],)

    def lack(self, network: Any, name: str, weights: str | None) -> None:
        """Fill the network, or note why it cannot be filled yet."""
        if lacking := fill(network, name, weights):
            self.await_weights(f"encoder timm {name!r}: {lacking}")

    def read_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """What the network reads of a picture of ``size`` pixels.

        Raises:
            ValueError: the size is not a multiple of the patch.
        """
        if any(side % p or side < p for side, p in zip(size, self.patch, strict=True)):
            raise ValueError(
                f"encoder.image_size: {size[0]} x {size[1]} is not a multiple of {self.patch[0]}; change it, or "
                f"set encoder.patch to the pixels that make a token (pictures are resized to {self.stride} each)"
            )
        height, width = (side // p * self.stride for side, p in zip(size, self.patch, strict=True))
        return height, width

    def prepared(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), as the modality normalises them, in the network's size and range."""
        size = self.read_size(tuple(x.shape[2:]))
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(
                x, size=size, mode=self.interpolation, align_corners=False, antialias=self.antialias
            )
        return self.range.entered(x)

    def forward(
        self,
        x: Tensor,
        *,
        want: Mapping[str, int] | None = None,
        mask: Tensor | None = None,
        select: Mapping[str, Tensor] | None = None,
        drop: float | None = None,
        clock: Clock | None = None,
    ) -> dict[str, Tensor]:
        """Features of x (B, 3, H, W); arguments as in :class:`vtp_plugins.protocols.Encoder`.

        Raises:
            ValueError: a mask or a drop-path rate, which foreign networks have no use for, or another signal.
            LookupError: an output that it doesn't give.
            DataFault: its weights never came.
        """
        self.check_filled()
        want = {"cls": len(x), "patches": len(x)} if want is None else want
        levels = self._levels(want)
        _refuse(x, mask, drop)
        x = self.prepared(x[: max(want.values())])
        if not levels:
            return self._outputs(self.network.forward_features(x))
        blocks = sorted(set(levels.values()))
        keys = {"indices": [level - 1 for level in blocks], "norm": False, "output_fmt": "NLC"}
        if len(levels) == len(want):
            middle, found = (
                self.network.forward_intermediates(x, **keys, stop_early=True, intermediates_only=True),
                {},
            )
        else:
            final, middle = self.network.forward_intermediates(x, **keys)
            found = self._outputs(final)
        return found | {name: middle[blocks.index(level)] for name, level in levels.items()}

    def _outputs(self, final: Tensor) -> dict[str, Tensor]:
        """``patches`` (B, N, D) and ``cls`` (B, D) of what the network ends in."""
        if final.ndim == 4:
            final = final if self.channels_last else final.permute(0, 2, 3, 1)  # (B, D, h, w) -> (B, h, w, D)
            patches = final.flatten(1, 2)  # -> (B, N, D)
        else:
            patches = final[:, self.prefix :]
        return {"patches": patches, "cls": final[:, 0] if self.has_cls else patches.mean(1)}

    def _levels(self, want: Mapping[str, int]) -> dict[str, int]:
        """The blocks k whose ``hidden:k`` is wanted."""
        levels = {}
        for output in want:
            name, _, block = output.partition(":")
            if name == "hidden" and block.isdecimal() and 1 <= int(block) <= self.depth:
                levels[output] = int(block)
            elif output not in {"cls", "patches"} and not output.startswith("patches@"):
                known = (
                    f"cls, patches and hidden:k, k up to {self.depth}" if self.depth else "cls and patches"
                )
                raise LookupError(f"encoder timm has no output {output!r}; it gives {known}")
        return levels


def _refuse(x: Tensor, mask: Tensor | None, drop: float | None) -> None:
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"the encoder reads (B, 3, H, W), not {tuple(x.shape)}")
    if mask is not None:
        raise ValueError("encoder timm has no mask token; masked objectives need encoder: {use: vit}")
    if drop:
        raise ValueError(f"encoder timm has no drop-path of ours; leave the objective's drop: {drop} out")


def _trim(network: Any, name: str, affine: bool, eps: float | None) -> None:
    """Take the final norm's weights away and set the eps of all norms, as far as asked."""
    if not affine:
        norm = getattr(network, "norm", None)
        if not isinstance(norm, nn.LayerNorm):
            raise ValueError(f"affine: {name} ends in no layer norm; leave affine: true")
        network.norm = nn.LayerNorm(norm.normalized_shape, norm.eps, elementwise_affine=False)
    if eps is not None:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
