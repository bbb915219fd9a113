"""What an export is made from: a run, another export or an official VTP directory, read into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
from torch import Tensor

from vtp_core import options
from vtp_core.components import resolve
from vtp_core.errors import DataFault, Fault, StackFault
from vtp_core.export import foreign_config, native
from vtp_core.latents import manifest as latents
from vtp_core.official.config import Config, is_official, read_config
from vtp_core.run import metrics
from vtp_core.run.checkpoint import latest, load, step_of
from vtp_core.run.directory import RunDirectory
from vtp_core.run.names import FILE as NAMES
from vtp_core.stack import Stack, load_run_stack
from vtp_core.statistics import check
from vtp_core.tokenizer import chosen, read_run
from vtp_plugins.registry import Registry

PROBES = "probes.jsonl"


@dataclass(frozen=True, slots=True)
class Source:
    """A stack with the tensors of its checkpoint that are of use without training.

    Attributes:
        path: where it was read.
        stack: not checked, since its plugins need not be installed.
        parts: ``tokenizer``, ``statistics``, ``generator``, ``generator.ema``, and objectives that export something.
        weights: ``student`` or ``ema``.
        step: of the checkpoint; 0 where there is none.
        base: the release's config where the tokenizer came from the release.
        data: fingerprint of the data.
    """

    path: Path
    stack: Stack
    parts: dict[str, dict[str, Tensor]]
    weights: str
    step: int
    base: Config | None
    data: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Readings of the probes."""
        return list(metrics.read(self.path / PROBES)) if (self.path / PROBES).is_file() else []

    @property
    def texts(self) -> dict[str, bytes]:
        """Files beside the weights that stay as they are."""
        return {
            name: (self.path / name).read_bytes() for name in (NAMES, PROBES) if (self.path / name).is_file()
        }


def read_source(
    path: Path, weights: str = "student", statistics: Path | None = None, registry: Registry | None = None
) -> Source:
    """Read what an export is made from.

    Args:
        path: a run, an export or an official VTP directory.
        weights: ``ema`` takes the EMA teacher's encoder and bottleneck and the generator's average.
        statistics: a folder that ``vtp latents`` wrote, whose statistics come along.
        registry: what names mean; by default what is installed.

    Raises:
        DataFault: nothing loadable is there, or the statistics are another tokenizer's.
        StackFault: there are no such weights.
    """
    stack = load_run_stack(path, registry or Registry(), check=False)
    step, parts, base, data = _read(path, registry)
    if foreign_config.is_autoencoder(path):
        stack = replace(
            stack, name=foreign_config.read_autoencoder_config(path).provenance.name or stack.name
        )
    if native.is_native(path):
        stack = replace(stack, name=str(native.read_config(path).get("name", stack.name)))
    kept = {name: dict(part) for name, part in parts.items() if _travels(stack, name)}
    if weights != "student":
        averages = _averaged(parts, weights)
        kept = {name: part for name, part in kept.items() if name != "generator.ema"} | averages
        if "tokenizer" in averages:
            kept.pop("statistics", None)  # they are the student's
    if statistics is not None:
        kept["statistics"] = latents.read_statistics(statistics, latents.read(statistics))
        check(kept["statistics"], kept["tokenizer"], f"{statistics}: the latent statistics")
    return Source(path, stack, kept, weights, step, base, data)


def _read(
    path: Path, registry: Registry | None
) -> tuple[int, Mapping[str, Mapping[str, Tensor]], Config | None, str]:
    """Step, parts, the release's config and the data's fingerprint."""
    if foreign_config.is_autoencoder(path):
        known = foreign_config.read_autoencoder_config(path).provenance
        return known.step, read_run(path, registry=registry)[1], _base(path, known.model_dump()), known.data
    if is_official(path):
        return 0, read_run(path)[1], read_config(path), ""
    if native.is_native(path):
        config = native.read_config(path)
        return int(config.get("step", 0)), read_run(path)[1], _base(path, config), str(config.get("data", ""))
    checkpoint = latest(path / "checkpoints")
    if checkpoint is None:
        raise DataFault(f"{path} has no valid checkpoint yet; run vtp resume {path}")
    environment = RunDirectory(path).environment() if (path / "environment.json").is_file() else {}
    return step_of(checkpoint), load(checkpoint, verify=False)[0], None, str(environment.get("data") or "")


def _base(path: Path, config: Mapping[str, Any]) -> Config | None:
    if config.get("official") is None:
        return None
    try:
        return Config.model_validate(config["official"])
    except pydantic.ValidationError as error:
        raise DataFault(f"{path / native.CONFIG}: 'official' is broken; export it again") from error


def _averaged(parts: Mapping[str, Mapping[str, Tensor]], weights: str) -> dict[str, dict[str, Tensor]]:
    """Averages in place of what is averaged."""
    if "generator.ema" not in parts:
        return {"tokenizer": chosen(parts, weights)}
    average = {key.removeprefix("generator."): value for key, value in parts["generator.ema"].items()}
    teacher = any(key.startswith(("encoder.", "bottleneck.")) for key in parts.get("teacher", {}))
    return {"generator": average} | ({"tokenizer": chosen(parts, weights)} if teacher else {})


def _travels(stack: Stack, part: str) -> bool:
    """Whether a checkpoint part is of use without training."""
    if part in {"tokenizer", "statistics", "generator", "generator.ema"} or part.startswith("exports/"):
        return True
    kind, _, name = part.partition("/")
    if kind != "objectives" or name not in stack.section("objectives"):
        return False
    node, modules = stack.section("objectives")[name], frozenset(stack.section("modules"))
    try:
        found = resolve(
            stack.registry,
            "objectives",
            f"objectives.{name}",
            node,
            stack.dial,
            modules,
            options.OBJECTIVE_KEYS,
        )
    except Fault:
        return True  # not installed here, so nobody knows
    return bool(found.cls.exports)


def check_weights(weights: str) -> None:
    """Refuse weights that nobody has heard of.

    Raises:
        StackFault: they are neither.
    """
    if weights not in {"student", "ema"}:
        raise StackFault(f"weights is 'student' or 'ema', not {weights!r}")
