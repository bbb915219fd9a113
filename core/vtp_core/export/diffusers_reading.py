"""A directory in the layout of diffusers' autoencoders to checkpoint parts of ours; nothing in it is run as code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core.build import Model, blueprint, tokenizer_only
from vtp_core.converting.values import check_values
from vtp_core.errors import DataFault, StackFault
from vtp_core.export import foreign_config
from vtp_core.models.absent import Absent
from vtp_core.run.sharded import files_of, headers, readable
from vtp_core.run.tensors import read_tensors
from vtp_core.stack import Stack, check_stack
from vtp_core.state import module_state
from vtp_core.statistics import digest, hexed, unhexed
from vtp_plugins.importing import Mismatch, check_tensors
from vtp_plugins.spec import Spec

WEIGHTS = "diffusion_pytorch_model.safetensors"
Parts = dict[str, dict[str, Tensor]]


def checked_model(stack: Stack) -> Model:
    """The tokenizer of a stack, without memory.

    Raises:
        StackFault: it has no decoder, or its signal is no image.
    """
    with torch.device("meta"):
        model = tokenizer_only(blueprint(stack))
    check_images(model)
    if model.decoder is None:
        raise StackFault("this format cannot express a tokenizer without a decoder; --format onnx can")
    return model


def check_images(model: Model) -> None:
    """Refuse a tokenizer of other signals than images.

    Raises:
        StackFault: it is one.
    """
    if model.spec.modality != "image" or isinstance(model.encoder, Absent):
        what = "no tokenizer" if isinstance(model.encoder, Absent) else f"modality {model.spec.modality!r}"
        raise StackFault(
            f"this format holds a tokenizer of images; this run has {what}: --format native holds it"
        )


def shapes_of(spec: Spec) -> dict[str, Any]:
    """What pipelines of diffusers ask an autoencoder's configuration for."""
    sides = list(spec.size)
    return {
        "in_channels": spec.signal_channels,
        "out_channels": spec.signal_channels,
        "latent_channels": spec.channels,
        "sample_size": sides[0] if len(set(sides)) == 1 else sides,
        "spatial_compression_ratio": spec.patch[0],
    }


def read_autoencoder(path: Path, stack: Stack) -> Parts:
    """Checkpoint parts of a directory in diffusers' layout, ``tokenizer`` and perhaps ``statistics``.

    Args:
        path: the directory; its weights may be in several files, as diffusers saves large ones.
        stack: its own, as :func:`vtp_core.stack.load_run_stack` gives it.

    Raises:
        DataFault: a file is missing or broken.
        Mismatch: tensors are missing, unexpected or of another shape, not finite, or all zero where new ones are not.
    """
    config = foreign_config.read_autoencoder_config(path)
    model = checked_model(check_stack(stack.name, stack.config, stack.registry))
    wanted = {name: tuple(value.shape) for name, value in module_state(model)["tokenizer"].items()}
    files = files_of(path, WEIGHTS)
    try:
        check_tensors({name: shape for name, (shape, _) in headers(files).items()}, wanted)
        tensors = {name: value for file in files for name, value in readable(read_tensors, file).items()}
        check_values(tensors, lambda: module_state(tokenizer_only(blueprint(stack)))["tokenizer"])
    except Mismatch as error:
        raise Mismatch(f"{path}: the weights do not fit its {foreign_config.FILE}\n{error}") from error
    statistics = statistics_of(config, model.spec, str(path / foreign_config.FILE))
    return {"tokenizer": tensors} | (
        {"statistics": _claimed(statistics, config, tensors)} if statistics else {}
    )


def statistics_of(config: foreign_config.Autoencoder, spec: Spec, where: str) -> dict[str, Tensor]:
    """``mean`` and ``std`` of the latent; empty where the configuration has none.

    Raises:
        DataFault: they are of another latent.
    """
    if config.latents_mean is None or config.latents_std is None:
        return {}
    try:
        found = {"mean": torch.tensor(config.latents_mean), "std": torch.tensor(config.latents_std)}
    except ValueError as error:
        raise DataFault(f"{where}: latents_mean and latents_std are ragged: {error}") from error
    found = {name: value.to(torch.float32) for name, value in found.items()}
    for name, value in found.items():
        if tuple(value.shape) not in {(spec.channels,), (spec.channels, *spec.grid)}:
            raise DataFault(
                f"{where}: latents_{name} {tuple(value.shape)} is not of {spec.channels} channels"
            )
    return found


def _claimed(
    statistics: dict[str, Tensor], config: foreign_config.Autoencoder, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Statistics with what they know of themselves, as long as the weights are those that they were taken of."""
    latents = config.provenance.latents
    if latents is None or (latents.of is not None and latents.of != hexed(digest(tensors))):
        return statistics  # saved anew by diffusers after training, or narrower
    found = {key: unhexed(value) for key in ("of", "data") if (value := getattr(latents, key)) is not None}
    return statistics | found | ({} if latents.count is None else {"count": torch.tensor(latents.count)})
