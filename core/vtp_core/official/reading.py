"""A VTP directory to a stack and checkpoint parts of ours; every tensor is looked at before it is believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core.models.rope import Rope
from vtp_core.official.config import Config, read_config
from vtp_core.official.hub import located
from vtp_core.official.keys import CLIP, to_ours
from vtp_core.official.layout import PERIODS, shapes
from vtp_core.official.stacks import tree_of
from vtp_core.run.sharded import files_of, headers, readable
from vtp_core.run.tensors import read_tensors
from vtp_core.stack import Stack
from vtp_core.statistics import check
from vtp_plugins.importing import Mismatch
from vtp_plugins.registry import Registry

WEIGHTS = "model.safetensors"
STATISTICS = "statistics.safetensors"
"""Ours, beside the weights: what ``vtp latents`` computed."""
_DTYPES = ("F32", "BF16", "F16")
_ROWS = 16
Parts = dict[str, dict[str, Tensor]]
Problem = tuple[str, str, str, str]


def read_official(source: str | Path) -> tuple[Stack, Parts]:
    """Stack and checkpoint parts of a VTP directory, ``tokenizer``, ``exports/clip`` and perhaps ``statistics``.

    Tensors narrower than float32 are widened; of the others no second copy is made.

    Args:
        source: a directory with ``config.json`` and ``model.safetensors``, perhaps in shards with an index; or
            the id of one on the Hugging Face hub, which ``VTP_OFFLINE=1`` looks for in the local cache alone.

    Raises:
        DataFault: the config is no VTP's, or a file is missing or broken.
        Mismatch: tensors are missing, unexpected, of another shape or dtype, all zero or not finite.
    """
    path = located(source)
    config = read_config(path)
    stack = Stack(path.name, tree_of(config, path), Registry())
    files = files_of(path, WEIGHTS)
    wanted = shapes(config)
    _refuse(path, _misfits(wanted, headers(files)))
    state = {name: value for file in files for name, value in readable(read_tensors, file).items()}
    _refuse(path, [*_broken(state), *_periods(state, config)])
    own = to_ours({name: value.float() for name, value in state.items() if not name.endswith(PERIODS)})
    parts: Parts = {"tokenizer": {}}
    for part, tensors in own.items():
        if part == CLIP:
            parts[f"exports/{CLIP}"] = tensors
        else:
            parts["tokenizer"] |= {f"{part}.{key}": value for key, value in tensors.items()}
    if (path / STATISTICS).is_file():
        parts["statistics"] = _statistics(path, parts["tokenizer"])
    return stack, parts


def _statistics(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    file = path / STATISTICS
    found = readable(read_tensors, file)
    check(found, tensors, str(file), "vtp latents computes those of this one")
    return found


# ---- what can be wrong with tensors


def _misfits(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[tuple[int, ...], str]]
) -> Iterator[Problem]:
    for name in [*wanted, *sorted(found.keys() - wanted.keys())]:
        if name not in found:
            yield "missing", name, _sides(wanted[name]), "-"
        elif name not in wanted:
            yield "unexpected", name, "-", _sides(found[name][0])
        elif found[name][0] != wanted[name]:
            yield "shape", name, _sides(wanted[name]), _sides(found[name][0])
        elif found[name][1] not in _DTYPES:
            yield "dtype", name, "F32", found[name][1]


def _broken(state: Mapping[str, Tensor]) -> Iterator[Problem]:
    """All zero or not finite. A tower none of whose biases has moved yet is young, not broken."""
    extremes = {
        name: torch.aminmax(value) for name, value in state.items()
    }  # makes nothing of a tensor's size
    bounds = {name: (float(low), float(high)) for name, (low, high) in extremes.items()}
    zero = {name for name, bound in bounds.items() if bound == (0, 0)}
    biases: dict[str, set[str]] = {}
    for name in state:
        if name.endswith("bias") and name != "logit_bias":
            biases.setdefault(_tower(name), set()).add(name)
    young = {name for names in biases.values() if names <= zero for name in names}
    for name, (low, high) in bounds.items():
        shape = _sides(tuple(state[name].shape))
        if not (low > -torch.inf and high < torch.inf):
            yield "not finite", name, shape, "NaN" if low != low else "inf"
        elif name in zero and name not in young and name not in {"trunk.mask_token", "logit_bias"}:
            yield "all zero", name, shape, "0"


def _tower(name: str) -> str:
    first = name.partition(".")[0]
    return first if first in {"trunk", "pixel_decoder"} else "text"


def _periods(state: Mapping[str, Tensor], config: Config) -> Iterator[Problem]:
    """The periods are constants: others would mean a model that is rotated differently."""
    for tower, prefix in (("trunk", "vision"), ("pixel_decoder", "decoder")):
        stored = state.get(f"{tower}.{PERIODS}")
        if stored is None:
            continue
        width, heads = (getattr(config, f"{prefix}_{key}") for key in ("embed_dim", "num_heads"))
        ours = Rope(width // heads, 2, "bfloat16").periods
        if not torch.equal(stored.float(), ours.float()):
            yield "periods", f"{tower}.{PERIODS}", "100^(2i/d) in BF16", "others"


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _refuse(path: Path, problems: Iterable[Problem]) -> None:
    """Tell all problems in one table.

    Raises:
        Mismatch: there is one.
    """
    rows = list(problems)
    if not rows:
        return
    kinds = list(dict.fromkeys(row[0] for row in rows))
    counts = ", ".join(f"{sum(row[0] == kind for row in rows)} {kind}" for kind in kinds)
    shown: list[Any] = [("problem", "tensor", "wanted", "found"), *rows[:_ROWS]]
    wide = [max(len(row[column]) for row in shown) for column in range(4)]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in shown]
    more = [f"... and {len(rows) - _ROWS} more"] if len(rows) > _ROWS else []
    raise Mismatch("\n".join([f"{path}: the tensors do not fit its config.json: {counts}", *lines, *more]))
