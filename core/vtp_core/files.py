"""``vtp encode`` and ``vtp decode``: pictures to latents in a file, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from vtp_core.data.pictures import BadSample, decode
from vtp_core.data.views import Centre
from vtp_core.errors import DataFault, StorageFault
from vtp_core.run.files import reason, replace
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.registry import Registry

ROWS = 64  # pictures of one pass


def encode_files(run: Path, files: list[Path], out: Path, registry: Registry | None = None) -> str:
    """Encode pictures, scaled and centre-cropped to the tokenizer's size, to raw latents.

    Returns:
        One line on what was written: ``latents`` (B, C, h, w) float32, with the files' names as metadata.

    Raises:
        DataFault: a file is no picture.
        StorageFault: the output cannot be written.
    """
    if out.exists() and not out.is_file():  # a device must not be replaced by a file
        raise StorageFault(f"{out} is no plain file; -o names the file to write, such as z.safetensors")
    tokenizer = Tokenizer.from_pretrained(run, registry=registry)
    view = Centre(tokenizer.spec.size)
    parts = []
    for start in range(0, len(files), ROWS):
        pictures = [view(_picture(file)) for file in files[start : start + ROWS]]
        images = torch.cat(pictures).float() / 255  # B x (1, 3, H, W) -> (B, 3, H, W)
        with torch.no_grad():
            parts.append(tokenizer.encode(images).float().cpu())
    z = torch.cat(parts).contiguous()
    _folder(out.parent)
    replace(out.resolve(), save({"latents": z}, metadata={"files": "\n".join(file.name for file in files)}))
    return f"{out}: latents {tuple(z.shape)}"


def _picture(file: Path) -> Tensor:
    try:
        return decode(file.read_bytes(), str(file))
    except OSError as error:
        raise DataFault(f"{file} cannot be read: {reason(error)}; give PNG, JPEG or WebP files") from error
    except BadSample as error:
        raise DataFault(f"{error}; give PNG, JPEG or WebP files") from error


def _folder(path: Path) -> None:
    """Make an output folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageFault(f"{path} cannot be made: {reason(error)}; -o names another place") from error


def write_picture(path: Path, image: Tensor) -> None:
    """Write a picture (3, H, W) uint8 as PNG.

    Raises:
        StorageFault: it cannot be written.
    """
    if path.exists() and not path.is_file():
        raise StorageFault(f"{path} is no plain file; -o names the file to write, such as grid.png")
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".webp"}:
        raise StorageFault(f"{path}: -o names a picture, such as grid.png")
    _folder(path.parent)
    try:
        to_pil_image(image.cpu()).save(path)
    except OSError as error:
        raise StorageFault(f"{path} cannot be written: {reason(error)}") from error


def decode_file(run: Path, latents: Path, out: Path, registry: Registry | None = None) -> list[Path]:
    """Decode raw latents to PNG files, rounded to uint8.

    Raises:
        DataFault: the file holds no ``latents`` of this tokenizer's channels.
        StorageFault: the output cannot be written.
    """
    tokenizer = Tokenizer.from_pretrained(run, registry=registry)
    z = _latents(latents, tokenizer, run)
    _folder(out)
    paths: list[Path] = []
    for rows in z.split(ROWS):
        with torch.no_grad():
            images = tokenizer.decode(rows).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        for image in images:
            paths.append(out / f"{len(paths):05d}.png")
            to_pil_image(image).save(paths[-1])
    return paths


def _latents(file: Path, tokenizer: Tokenizer, run: Path) -> Tensor:
    """Checked latents (B, C, h, w) out of a file."""
    try:
        z = load_file(file).get("latents")
    except (OSError, SafetensorError) as error:
        raise DataFault(f"{file} is no safetensors file: {reason(error)}; vtp encode writes one") from error
    channels = tokenizer.spec.channels
    if z is None or z.ndim != 4 or z.shape[1] != channels or not z.is_floating_point() or not z.numel():
        found = "no tensor 'latents'" if z is None else f"'latents' {tuple(z.shape)} {z.dtype}"
        raise DataFault(f"{file} holds {found}; (B, {channels}, h, w) of floats is wanted for {run}")
    if not z.isfinite().all():
        raise DataFault(f"{file} holds latents that are not finite")
    return z.float()
