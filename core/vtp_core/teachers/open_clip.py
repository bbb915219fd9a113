"""The image tower of an open_clip model as a teacher; its weights are a file on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vtp_core.errors import DataFault, StackFault
from vtp_core.teachers.frozen import (
    Frozen,
    Interpolation,
    Normalise,
    check_size,
    constants,
    file_of,
    hidden_levels,
    is_meta,
)
from vtp_plugins.errors import suggestion
from vtp_plugins.spec import Spec


class OpenCLIP(Frozen):
    """``patches`` and ``cls`` after the tower's final norm, before CLIP's projection, at the tower's width.

    Args:
        spec: tells the tokenizer's grid.
        name: open_clip's name of the model; OpenAI's weights want the ``-quickgelu`` one.
        weights: a file that open_clip loads, with both towers; None is
            ``$VTP_HOME/open_clip/<name>.safetensors``; ``random`` is for tests.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks.
        normalise: ``own`` takes CLIP's mean and deviation out, ``signed`` makes [-1, 1] of pictures, ``none``
            leaves [0, 1].
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
        import open_clip

        known = open_clip.list_models()
        if name not in known:  # a name like hf-hub:... would be downloaded
            raise ValueError(f"name: open_clip has no model {name!r}{suggestion(name, known)}")
        file = file_of("open_clip", name, weights, allow_random)
        patch = int(open_clip.get_model_config(name)["vision_cfg"].get("patch_size") or 0)
        if not patch:
            raise ValueError(f"name: {name!r} has no ViT of open_clip's own; use the timm teacher")
        check_size(size, patch)
        if size is None:
            size = (spec.grid[0] * patch, spec.grid[1] * patch)
        tower = _tower(name, file, size)
        own = (tower.image_mean, tower.image_std)
        mean, deviation = constants(normalise, own if all(own) else _clip_constants())
        super().__init__(
            spec, width=int(tower.ln_post.normalized_shape[0]), stride=(patch, patch), size=size,
            interpolation=interpolation, antialias=antialias, mean=mean, deviation=deviation,
        )  # fmt: skip
        self.network = tower
        self.requires_grad_(False).eval()

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """``patches`` (B, N, D), ``cls`` (B, D) and ``hidden:k``."""
        levels, depth = hidden_levels(want), len(self.network.transformer.resblocks)
        for name, level in levels.items():
            if not 1 <= level <= depth:
                raise StackFault(f"open_clip teacher: no {name!r}; k goes from 1 to {depth}")
        blocks = sorted({*levels.values(), depth})
        found = self.network.forward_intermediates(
            x, indices=[level - 1 for level in blocks], intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        middle = found["image_intermediates"]
        cls = self.network.ln_post(found["image_intermediates_prefix"][-1])[:, 0]  # (B, 1, D) -> (B, D)
        out = {name: middle[blocks.index(level)] for name, level in levels.items()}
        return out | {"patches": self.network.ln_post(middle[-1]), "cls": cls}


def _tower(name: str, file: Path | None, size: int | tuple[int, int]) -> Any:
    """The image tower, whose position table has the grid of ``size``."""
    import open_clip

    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are asked for or loaded next
    try:
        model = open_clip.create_model(
            name, load_weights=False, force_image_size=size, device="meta" if is_meta() else "cpu"
        )
    finally:
        logging.disable(logging.NOTSET)
    if file is not None:
        try:
            open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
        except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
            lines = " ".join(str(error).split())
            raise DataFault(f"{file} holds other weights than {name}'s: {lines[:300]}") from error
    return model.visual


def _clip_constants() -> tuple[Any, Any]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
