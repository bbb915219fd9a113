"""From what an importer gives to a stack that loads, the tensors of its parts, and latent statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from vtp_core import adopting
from vtp_core.build import Model, blueprint, build, spec_of, without_training
from vtp_core.converting.statistics import of_file, of_scale
from vtp_core.converting.values import check_values
from vtp_core.errors import DataFault, StackFault
from vtp_core.inheriting import inherited
from vtp_core.models.absent import Absent
from vtp_core.overrides import merged
from vtp_core.stack import Stack, check_stack
from vtp_core.state import module_state
from vtp_core.statistics import digest
from vtp_core.tokenizer import read_run
from vtp_plugins.importing import Converted, Mismatch, check_tensors
from vtp_plugins.registry import Registry

Parts = dict[str, Mapping[str, Tensor]]
_ABSENT = "absent"  # the encoder that stands for a missing tokenizer


@dataclass(frozen=True, slots=True)
class Composed:
    """A stack and its checkpoint parts, without statistics.

    Attributes:
        stack: checked.
        model: its modules, without memory.
        parts: tensors by part.
        statistics: of the tokenizer that a generator was joined with, or those among its own tensors.
    """

    stack: Stack
    model: Model
    parts: Parts
    statistics: Mapping[str, Tensor]


def composed(
    converted: Converted, name: str, tokenizer: Path | None, overrides: Iterable[str], registry: Registry
) -> Composed:
    """Join what was converted with a tokenizer, and hold every tensor against the modules of the stack.

    Args:
        converted: as the importer gives it.
        name: of the stack.
        tokenizer: the run whose tokenizer a generator gets; without one its latents alone are sampled.
        overrides: of the stack.
        registry: what is installed.

    Raises:
        StackFault: the tokenizer is another generator's, or an override is wrong.
        DataFault: the tokenizer can't be read.
        Mismatch: tensors are not those of the stack's modules, or all zero where a new module's are not.
    """
    tree: dict[Any, Any] = {"modality": "image", **_plain(converted.sections)}
    parts: Parts = dict(converted.parts)
    source = None
    if "generator" not in tree:
        if tokenizer is not None:
            raise StackFault(f"--tokenizer: {name} is a tokenizer itself; only a generator is given one")
    elif tokenizer is None:
        tree["encoder"] = _absent(converted)
        parts["tokenizer"] = {"encoder.place": torch.empty(0)}
    else:
        tree, source = _joined(tree, tokenizer, registry)
        parts["tokenizer"] = source.tensors
    stack = check_stack(name, merged(OmegaConf.create(tree), overrides), registry)
    if source is not None:
        stack = adopting.settled(stack)
        parts |= adopting.exports_of(stack, source)
    plans = without_training(blueprint(stack))
    if source is not None:
        _check_latent(spec_of(plans), converted, tokenizer)
    with torch.device("meta"):
        model = build(plans, converted.classes)
    _check(module_state(model), parts)
    _check_values(name, converted, lambda: module_state(build(plans, converted.classes)))
    earlier = dict(source.parts.get("statistics", {})) if source else {}
    return Composed(stack, model, parts, dict(converted.statistics) or earlier)


def statistics_of(made: Composed, file: Path | None, scale: float | None) -> dict[str, Tensor]:
    """The latent statistics of a composition: a file's, a scale's, or those that came along; perhaps none.

    Raises:
        StackFault: both are given.
        DataFault: the file is of another latent, or a generator with a tokenizer has none at all.
    """
    spec = made.model.spec
    if file is not None and scale is not None:
        raise StackFault("--scale and --statistics exclude each other")
    found = dict(made.statistics)
    if file is not None:
        found = of_file(file, spec.channels, spec.grid)
    if scale is not None or (isinstance(made.model.encoder, Absent) and not found):
        found = of_scale(1.0 if scale is None else scale, spec.channels)
    if found:
        return {**found, "of": digest(made.parts["tokenizer"])}
    links: Any = made.model.bottleneck.links if made.model.bottleneck is not None else ()
    normal = any(getattr(link, "normalises", False) for link in links)
    if made.model.generator is not None and made.model.decoder is not None and not normal:
        raise DataFault(
            "the tokenizer has no latent statistics, through which this generator sees it\n"
            "--scale 0.18215 is what most generators over SD-VAE were trained with; --statistics FILE has mean and std"
        )
    return {}


def _plain(node: Any) -> Any:
    """Lists for tuples, which YAML doesn't know."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list | tuple) else node


def _absent(converted: Converted) -> dict[str, Any]:
    channels, *grid = converted.latent
    if not grid:
        raise StackFault(
            "grid: the weights don't tell the cells of the latent; say grid=[32,32], or give --tokenizer RUN"
        )
    return {"use": _ABSENT, "channels": channels, "grid": grid}


def _joined(tree: dict[Any, Any], run: Path, registry: Registry) -> tuple[dict[Any, Any], adopting.Earlier]:
    """The tree with a run's tokenizer, and that run."""
    tree = inherited({**tree, "tokenizer": {"from": str(run)}}, registry)
    kept = {key: value for key, value in tree["tokenizer"].items() if key != "from"}
    return {**tree, "tokenizer": kept}, adopting.Earlier(run, read_run(run)[1], "student")


def _check_latent(spec: Any, converted: Converted, run: Path | None) -> None:
    channels, *grid = converted.latent
    if spec.channels != channels:
        raise StackFault(
            f"--tokenizer {run}: its latents have {spec.channels} channels, the generator's {channels}"
        )
    if grid and tuple(grid) != spec.grid:
        size = [cells * patch for cells, patch in zip(grid, spec.patch, strict=True)]
        raise StackFault(
            f"--tokenizer {run}: its latents are {spec.grid} cells, the generator's {tuple(grid)}; where the "
            f"tokenizer takes such pictures: encoder.image_size={size[0]}"
        )


def _check_values(name: str, converted: Converted, fresh: Callable[[], Mapping[str, Any]]) -> None:
    """Hold what the importer gave against what a new network of the stack would have."""

    def joint(parts: Mapping[str, Any]) -> dict[str, Tensor]:
        return {f"{part}:{key}": t for part, tensors in parts.items() for key, t in tensors.items()}

    try:
        check_values(joint(converted.parts), lambda: joint(fresh()))
    except Mismatch as error:
        raise Mismatch(f"{name}: values that no training leaves behind\n{error}") from error


def _check(wanted: Mapping[str, Mapping[str, Tensor]], parts: Parts) -> None:
    for name in ("tokenizer", "generator"):
        if name not in wanted:
            continue
        shapes = [
            {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            for tensors in (parts.get(name, {}), wanted[name])
        ]
        try:
            check_tensors(*shapes)
        except Mismatch as error:
            raise Mismatch(f"{name}: the tensors are not those of the stack's modules\n{error}") from error
