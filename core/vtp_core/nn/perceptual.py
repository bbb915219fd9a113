"""LPIPS (arXiv 1801.03924) as a frozen function: the lpips package's heads on a registered trunk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vtp_core import weights
from vtp_core.nn.precision import full_precision


class Perceptual:
    """Distance of two batches in the features of a frozen network.

    It is no module, so that it is never trained, saved, averaged or put into training mode.

    Args:
        net: ``alex`` or ``vgg``.
        trunk: ``weights`` are those that ``vtp weights import`` brought; ``random`` is for tests.
    """

    def __init__(self, net: Literal["alex", "vgg"], trunk: Literal["weights", "random"] = "weights") -> None:
        import lpips

        with warnings.catch_warnings(), torch.device("meta"):  # no draws, no classifier of 60 million weights
            warnings.simplefilter("ignore", UserWarning)  # lpips uses arguments that torchvision renamed
            frame = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
        heads = torch.load(
            Path(lpips.__file__).with_name("weights") / "v0.1" / f"{net}.pth",
            map_location="cpu",
            weights_only=True,
        )
        self.heads = [heads[f"lin{level}.model.1.weight"].flatten() for level in range(frame.L)]  # (c,)
        self.slices: list[nn.Module] = [
            getattr(frame.net, f"slice{i}") for i in range(1, frame.net.N_slices + 1)
        ]
        if trunk == "weights":
            self._load(weights.path(f"lpips-{net}"))
        else:
            self._draw()
        for module in self.slices:
            module.requires_grad_(False).eval()

    def _load(self, path: Path) -> None:
        from safetensors.torch import load_file

        values = load_file(path)
        for module in self.slices:
            own = {key: values[f"features.{key}"] for key in module.state_dict()}
            module.load_state_dict(own, assign=True)

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for module in self.slices:
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
                else:
                    nn.init.zeros_(parameter)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean distance, a scalar, of x from y, (B, 3, h, w), normalised by ImageNet's mean and deviation.

        That is what LPIPS makes of its own input in [-1, 1]; no gradient flows to y.
        """
        self._follow(x)
        with full_precision(x):
            with torch.no_grad():
                aims = self._features(y)
            levels = zip(self.heads, self._features(x), aims, strict=True)
            parts = [(head @ (a - b).square().mean((0, 2, 3))) for head, a, b in levels]
        return torch.stack(parts).sum()

    def _features(self, x: Tensor) -> list[Tensor]:
        out = []
        for module in self.slices:
            x = module(x)
            length = torch.linalg.vector_norm(x, dim=1, keepdim=True)  # its slope is 0, not NaN, where x is 0
            out.append(x / (length + 1e-10))
        return out

    def _follow(self, x: Tensor) -> None:
        """Move to where x is; a module would be moved by its parent."""
        if self.heads[0].device != x.device or self.heads[0].dtype != x.dtype:
            self.heads = [head.to(x) for head in self.heads]
            self.slices = [module.to(x) for module in self.slices]
