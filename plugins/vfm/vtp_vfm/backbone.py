"""A network of timm without its classifier, and its weights from a file on this machine."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtp_core import weights as registry
from vtp_core.teachers.frozen import is_meta, load_into
from vtp_plugins.errors import DataFault, suggestion

FLEXIBLE = "dynamic_img_size"  # timm's name for positions that are resampled to the size at hand


def backbone(name: str, arguments: Mapping[str, Any], size: tuple[int, int] | None) -> Any:
    """A network with random weights; of a ViT the position table is resampled to what it reads.

    Args:
        name: timm's, with or without the tag of its weights.
        arguments: of its constructor.
        size: what it will read, for networks that take one size alone; None leaves their own.

    Raises:
        ValueError: timm knows no such network, or it takes no such arguments.
    """
    import timm

    if not timm.is_model(name):
        near = [known for known in timm.list_models() if known[:4] == name[:4]] or ["vit_base_patch14_dinov2"]
        raise ValueError(f"name: timm has no model {name!r}{suggestion(name, near)}")
    keys: dict[str, Any] = {"pretrained": False, "num_classes": 0, **arguments}
    try:
        with torch.device("meta"):
            shape = timm.create_model(name, **keys)
        known = inspect.signature(type(shape).__init__).parameters
        if FLEXIBLE in known:
            keys.setdefault(FLEXIBLE, True)
        elif size is not None and "img_size" in known:
            keys["img_size"] = size
        if getattr(shape, "global_pool", "") == "map":
            keys["global_pool"] = ""  # a pooling head that nothing here reads
        return timm.create_model(name, **keys)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"arguments: {name} can't be built: {str(error).splitlines()[0]}") from error


def patch_of(network: Any) -> int:
    """Pixels of a patch of a ViT, whose tokens keep that stride to its end; 0 of other networks."""
    if not hasattr(network, "blocks") or not hasattr(network, "patch_embed"):
        return 0
    return int(network.patch_embed.patch_size[0])


def constants_of(network: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that timm knows for a network."""
    from timm.data.config import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(network)
    return tuple(found["mean"]), tuple(found["std"])


def fill(network: Any, name: str, weights: str | None) -> str:
    """Load a file into a network; returns why the weights are not there yet, empty where they are.

    Args:
        network: gets the tensors.
        name: of the network.
        weights: a file, ``random``, ``checkpoint``, or None for what ``vtp weights import`` brought.

    Raises:
        DataFault: the file holds other weights.
    """
    if weights == "random" or is_meta():
        return ""
    if weights == "checkpoint":
        return "its weights come with the checkpoint of its run, which was not loaded"
    if weights is None:
        try:
            file = registry.tower("timm", name)
        except DataFault as error:
            return str(error)
    else:
        file = Path(weights).expanduser()
        if not file.is_file():
            return f"there is no file {file}; without encoder.weights it is what vtp weights import {name} brings"
    heads = network.pretrained_cfg.get("classifier") or ()
    beside = [f"{head}." for head in ((heads,) if isinstance(heads, str) else heads)]
    load_into(network, file, [*beside, "attn_pool."])
    return ""


class Filled(nn.Module):
    """A module whose weights may be brought later by a checkpoint; used without them it faults.

    Attributes:
        lacking: why there are no weights; empty where there are.
    """

    lacking: str = ""

    def await_weights(self, lacking: str) -> None:
        """Note why weights are lacking, until a state dict is loaded."""
        self.lacking = lacking
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]

    def check_filled(self) -> None:
        """Refuse to compute with weights that never came.

        Raises:
            DataFault: there are none.
        """
        if self.lacking:
            raise DataFault(self.lacking)


def _loaded(module: Any, incompatible: Any) -> None:
    module.lacking = ""
