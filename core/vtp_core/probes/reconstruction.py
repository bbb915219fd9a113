"""How well images survive: PSNR, SSIM (Wang et al. 2004) and LPIPS (arXiv 1801.03924), per image."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp_core import weights
from vtp_core.errors import DataFault
from vtp_core.probes import LeftOut, up_to
from vtp_plugins.reading import Reading
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Bench


class Reconstruction:
    """PSNR, SSIM and LPIPS of reconstructions, each per image and then averaged.

    Args:
        spec: of the tokenizer.
        splits: names of splits; without them all.
        limit: images per split; None takes all.
        lpips: trunk of LPIPS, None for no LPIPS. Without its weights LPIPS is left out with one line.
    """

    fields: frozenset[str] = frozenset()

    def __init__(
        self,
        spec: Spec,
        *,
        splits: tuple[str, ...] = (),
        limit: int | None = 500,
        lpips: Literal["alex", "vgg"] | None = "alex",
    ) -> None:
        self.splits, self.limit, self.lpips = splits, limit, lpips
        self.notes: list[str] = []

    @torch.no_grad()
    def __call__(self, tokenizer: Any, bench: Bench) -> list[Reading]:
        self.notes = []
        network = self._network(bench.device)
        out: list[Reading] = []
        for split in self.splits or bench.splits:
            out += self._split(split, bench, network)
        return out

    def _network(self, device: torch.device) -> nn.Module | None:
        if self.lpips is None:
            return None
        try:
            return lpips_network(self.lpips).to(device)
        except (LeftOut, DataFault) as error:
            self.notes.append(f"LPIPS left out: {error}")
            return None

    def _split(self, split: str, bench: Bench, network: nn.Module | None) -> list[Reading]:
        found: dict[str, list[Tensor]] = {
            name: [] for name in ("psnr", "ssim", "lpips")[: 3 if network else 2]
        }
        sides: tuple[int, ...] = ()
        for x, y in up_to(self.limit, bench.reconstructions(split)):
            found["psnr"].append(psnr(x, y))
            found["ssim"].append(ssim(x, y))
            if network:
                found["lpips"].append(network(x * 2 - 1, y * 2 - 1).flatten())
            sides = tuple(x.shape[2:])
        data = f"{'x'.join(map(str, sides))} px, float [0, 1] clamped, not rounded to uint8"
        how = {
            "psnr": f"dB per image, averaged | {data}",
            "ssim": f"Gaussian 11x11 sigma 1.5, edges reflected, RGB, per image, averaged | {data}",
            "lpips": f"LPIPS v0.1 {self.lpips}, per image, averaged | {data}",
        }
        values = {name: torch.cat(parts) for name, parts in found.items()}
        return [
            Reading(f"reconstruction/{name}", split, x.double().mean().item(), len(x), how[name])
            for name, x in values.items()
        ]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images in [0, 1]; at most 100, for equal images."""
    error = (x.double() - y.double()).square().flatten(1).mean(1)  # (B, ch, H, W) -> (B,)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, (B,), of images in [0, 1] of 6 pixels or more; equal to torchmetrics'."""
    x, y = (F.pad(image, (5, 5, 5, 5), mode="reflect") for image in (x, y))
    down, along = (_windows(side - 10, x) for side in x.shape[2:])
    maps = torch.stack([x, y, x * x, y * y, x * y])  # (5, B, ch, H + 10, W + 10)
    mean_x, mean_y, xx, yy, xy = down.T @ (maps @ along)  # -> (5, B, ch, H, W)
    var_x, var_y, both = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    form = (2 * both + 0.03**2) / (var_x + var_y + 0.03**2)
    found: Tensor = (light * form).flatten(1).mean(1)
    return found


def _windows(places: int, like: Tensor) -> Tensor:
    """A Gaussian window a column, (places + 10, places): matrix products beat a convolution."""
    at = torch.arange(places + 10, dtype=like.dtype, device=like.device)
    offset = at[:, None] - at[:places]
    window = torch.exp(-(offset - 5).square() / (2 * 1.5**2)).where((offset >= 0) & (offset <= 10), 0)
    return window / window.sum(0)


def lpips_network(trunk: Literal["alex", "vgg"]) -> nn.Module:
    """The lpips package's network with the trunk of ``vtp weights``; it never downloads.

    Raises:
        DataFault: the trunk's weights are missing.
        LeftOut: the package lpips is not installed.
    """
    file = weights.path(f"lpips-{trunk}")
    try:
        import lpips
    except ImportError as error:
        raise LeftOut("the package lpips is not installed: pip install lpips") from error
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips names torchvision's arguments the old way
        network = lpips.LPIPS(net=trunk, pretrained=True, pnet_rand=True, verbose=False)
    state = load_file(file)
    for name, parameter in network.net.named_parameters():
        _, place, kind = name.split(".")  # slice2.3.weight
        parameter.data.copy_(state[f"features.{place}.{kind}"])
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen
