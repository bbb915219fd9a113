"""The image tower of an open_clip model as a teacher; its weights are a file on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from vtp_core.converting.values import check_values
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
    load_into,
)
from vtp_core.teachers.timm import Timm
from vtp_plugins.errors import suggestion
from vtp_plugins.spec import Spec


class OpenCLIP(Frozen):
    """``patches`` and ``cls`` after the tower's final norm, before CLIP's projection, at the tower's width.

    Args:
        spec: tells the tokenizer's grid.
        name: open_clip's name of the model, and behind a dot that of its weights, which tells mean and deviation:
            ``ViT-L-14.laion2b_s32b_b82k``. OpenAI's weights want the ``-quickgelu`` model.
        weights: a file that open_clip loads, with both towers; None is the one that
            ``vtp weights import <name>`` put into ``$VTP_HOME/open_clip``; ``random`` is for tests.
        size: side of what it reads, or (height, width); None gives as many tokens as the tokenizer has.
        interpolation: of the resize.
        antialias: whether the resize filters when it shrinks.
        normalise: ``own`` takes the weights' mean and deviation out, CLIP's where no weights are named; ``signed``
            makes [-1, 1] of pictures, ``none`` leaves [0, 1].
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

        model, _, tag = name.partition(".")
        known = open_clip.list_models()
        if model not in known:  # a name like hf-hub:... would be downloaded
            raise ValueError(f"name: open_clip has no model {model!r}{suggestion(model, known)}")
        told: dict[str, Any] = open_clip.get_pretrained_cfg(model, tag) if tag else {}
        if tag and not told:
            tags = open_clip.list_pretrained_tags_by_model(model)
            raise ValueError(f"name: open_clip has no weights {tag!r} of {model}{suggestion(tag, tags)}")
        file = file_of("open_clip", name, weights, allow_random)
        network, width, patch, size = _network(model, file, spec, size)
        clip = _clip_constants()
        mean, deviation = constants(normalise, (told.get("mean", clip[0]), told.get("std", clip[1])))
        super().__init__(
            spec, width=width, stride=(patch, patch), size=size,
            interpolation=interpolation, antialias=antialias, mean=mean, deviation=deviation,
        )  # fmt: skip
        self.network = network
        self.requires_grad_(False).eval()

    @staticmethod
    def outside_weights(options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names in ``vtp weights list`` that it reads with these options; model cards tell their licences."""
        return () if options["weights"] == "random" else (options["name"],)

    def features(self, x: Tensor, want: frozenset[str]) -> Mapping[str, Tensor]:
        """``patches`` (B, N, D), ``cls`` (B, D) and ``hidden:k``."""
        if isinstance(self.network, Timm):
            return self.network.features(x, want)
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


def _network(
    model: str, file: Path | None, spec: Spec, size: int | tuple[int, int] | None
) -> tuple[Any, int, int, int | tuple[int, int]]:
    """The image tower, its width, the pixels of a patch, and what it reads."""
    import open_clip

    shape = open_clip.get_model_config(model)["vision_cfg"]
    if trunk := shape.get("timm_model_name"):
        found = Timm(spec, name=trunk, weights="random", allow_random=True)
        if file is not None:
            load_into(found.network, file, ("head.",), "visual.trunk.")
        patch = found.stride[0]
    else:
        patch = int(shape.get("patch_size") or 0)
    if not patch:
        raise ValueError(f"name: {model!r} has no ViT of open_clip's own; use the timm teacher")
    check_size(size, patch)
    size = (spec.grid[0] * patch, spec.grid[1] * patch) if size is None else size
    if trunk:
        return found, found.width, patch, size
    tower = _tower(model, file, size)
    return tower, int(tower.ln_post.normalized_shape[0]), patch, size


def _tower(name: str, file: Path | None, size: int | tuple[int, int]) -> Any:
    """The image tower, whose position table has the grid of ``size``."""
    import open_clip

    model = _drawn(name, size)
    if file is not None:
        try:
            open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
            check_values(model.visual.state_dict(), lambda: _drawn(name, size).visual.state_dict())
        except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
            lines = " ".join(str(error).split())
            raise DataFault(f"{file} holds other weights than {name}'s: {lines[:300]}") from error
    return model.visual


def _drawn(name: str, size: int | tuple[int, int]) -> Any:
    import open_clip

    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are asked for or loaded next
    try:
        return open_clip.create_model(
            name, load_weights=False, force_image_size=size, device="meta" if is_meta() else "cpu"
        )
    finally:
        logging.disable(logging.NOTSET)


def _clip_constants() -> tuple[Any, Any]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
