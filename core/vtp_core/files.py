"""``vtp encode`` and ``vtp decode``: pictures to latents in a file, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import to_pil_image

from vtp_core.data.views import Centre, as_image
from vtp_core.errors import DataFault
from vtp_core.tokenizer import Tokenizer


def encode_files(run: Path, files: list[Path], out: Path) -> str:
    """Encode pictures, scaled and centre-cropped to the tokenizer's size, to raw latents.

    Returns:
        One line on what was written: ``latents`` (B, C, h, w) float32, with the files' names as metadata.

    Raises:
        DataFault: a file is no picture.
    """
    tokenizer = Tokenizer.from_pretrained(run)
    view = Centre(tokenizer.spec.size)
    images = torch.cat([view(_picture(file)) for file in files]).float() / 255  # B x (1, 3, H, W) -> (B, 3, H, W)
    with torch.no_grad():
        z = tokenizer.encode(images).float().cpu().contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": z}, out, metadata={"files": "\n".join(file.name for file in files)})
    return f"{out}: latents {tuple(z.shape)}"


def _picture(file: Path) -> torch.Tensor:
    try:
        with Image.open(file) as image:
            return as_image(image)
    except OSError as error:
        raise DataFault(f"{file}: not a picture that can be read ({error}); give PNG, JPEG or WebP files") from error


def decode_file(run: Path, latents: Path, out: Path) -> list[Path]:
    """Decode raw latents to PNG files, rounded to uint8.

    Raises:
        DataFault: the file holds no ``latents`` of this tokenizer's channels.
    """
    tokenizer = Tokenizer.from_pretrained(run)
    try:
        z = load_file(latents).get("latents")
    except (OSError, SafetensorError) as error:
        raise DataFault(f"{latents}: not a safetensors file ({error}); vtp encode writes one") from error
    if z is None or z.ndim != 4 or z.shape[1] != tokenizer.spec.channels:
        shape = None if z is None else tuple(z.shape)
        raise DataFault(f"{latents}: 'latents' is {shape}, (B, {tokenizer.spec.channels}, h, w) is wanted for {run}")
    with torch.no_grad():
        images = tokenizer.decode(z).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{index:05d}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        to_pil_image(image).save(path)
    return paths
