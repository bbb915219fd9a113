"""``config.json`` of exports to diffusers and to ONNX: untrusted, so only known fields are read. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vtp_core.errors import DataFault

FILE = "config.json"
CLASS = "AutoencoderVTP"
"""What diffusers' configuration calls our class; see :mod:`vtp_core.integrations.diffusers`."""
ONNX = "vtp-plugins-onnx"
"""``model_type`` of an export to ONNX."""
_MAX_BYTES = 1 << 26

Section = Literal["modality", "size", "encoder", "bottleneck", "decoder"]
Positive = Annotated[float, Field(gt=0)]
Digits = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(max_length=256)]


class _Known(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, populate_by_name=True)


class Latents(_Known):
    """What the latent statistics know of themselves: images behind them, their tokenizer, their data."""

    count: int | None = None
    of: Digits | None = None
    data: Digits | None = None


class Provenance(_Known):
    """Where the weights come from: run, step, data, and the VTP release's own fields where they are its."""

    name: Word = ""
    weights: Literal["student", "ema"] = "student"
    step: Annotated[int, Field(ge=0)] = 0
    data: Word = ""
    latents: Latents | None = None
    official: dict[str, Any] | None = None


class Autoencoder(_Known):
    """Fields of our class in diffusers.

    Attributes:
        stack: sections of a stack that make its tokenizer.
        scaling_factor: 1: what leaves ``encode`` is standardised already, and pipelines divide by this once more.
        latents_mean: by channel, or by channel and place; None leaves latents as they are.
        latents_std: likewise.
        provenance: where the weights come from.
    """

    class_name: Literal["AutoencoderVTP"] = Field(alias="_class_name")
    stack: dict[Section, Any]
    scaling_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    latents_mean: list[float] | list[list[list[float]]] | None = None
    latents_std: list[Positive] | list[list[list[Positive]]] | None = None
    provenance: Provenance = Provenance()

    @pydantic.field_validator("stack")
    @classmethod
    def _plain(cls, stack: dict[Section, Any]) -> dict[Section, Any]:
        if "${" in json.dumps(stack):
            raise ValueError("it holds plain values, and nothing to resolve")
        return stack

    @pydantic.model_validator(mode="after")
    def _both(self) -> Autoencoder:
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std go together")
        return self


def declared(path: Path) -> dict[str, Any]:
    """``config.json`` of a directory that is no run; empty where there is none, or one that cannot be read."""
    file = path / FILE
    if not file.is_file() or (path / "stack.yaml").exists():
        return {}
    try:
        with file.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        found = json.loads(raw) if len(raw) <= _MAX_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}  # whoever reads it in earnest says what is wrong
    return found if isinstance(found, dict) else {}


def is_autoencoder(path: Path) -> bool:
    """Whether a directory is an export to diffusers, or what diffusers saved of one."""
    return declared(path).get("_class_name") == CLASS


def is_onnx(path: Path) -> bool:
    """Whether a directory is an export to ONNX."""
    return declared(path).get("model_type") == ONNX


def checked(tree: Any, where: str) -> Autoencoder:
    """Fields of our class in diffusers out of a configuration.

    Raises:
        DataFault: it is another class's, or a field has a wrong value.
    """
    try:
        return Autoencoder.model_validate(tree)
    except pydantic.ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'][:2]))}: {e['msg']}, not {str(e['input'])[:64]!r}"
                 for e in error.errors(include_url=False)]  # fmt: skip
        raise DataFault(f"{where}: " + "; ".join(wrong[:4])) from error


def read_autoencoder_config(path: Path) -> Autoencoder:
    """``config.json`` of a directory in diffusers' layout.

    Raises:
        DataFault: a field has a wrong value.
    """
    return checked(declared(path), str(path / FILE))


def autoencoder_tree(path: Path) -> dict[str, Any]:
    """The tree of the stack of a directory in diffusers' layout; it names no data and trains nothing."""
    return {str(section): node for section, node in read_autoencoder_config(path).stack.items()}
