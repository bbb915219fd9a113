"""``vtp convert``: one or more published files to a directory that is a finished run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vtp_core.converting.composing import Composed, composed, statistics_of
from vtp_core.converting.files import Taken, read, state_dict
from vtp_core.converting.options import options_of, parted
from vtp_core.errors import DataFault, Fault, StackFault
from vtp_core.run import checkpoint, names
from vtp_core.run.directory import RunDirectory, check_free
from vtp_plugins.importing import Converted, Mismatch
from vtp_plugins.registry import Registry

_IMAGENET = "imagenet"
_CONFIG = "config.json"
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be converted.

    Attributes:
        format: name of the importer.
        file: the published file.
        beside: more files whose tensors belong to the same network.
        key: where in ``file`` the state dict is.
        words: ``key=value``: options of the importer, and overrides of the stack, whose keys have a dot.
        tokenizer: the run whose tokenizer a generator gets.
        statistics: a file of latent statistics.
        scale: what latents are multiplied by, in place of statistics.
        labels: a file with one label's name a line, or ``imagenet``.
    """

    format: str
    file: Path
    beside: tuple[Path, ...] = ()
    key: str | None = None
    words: tuple[str, ...] = ()
    tokenizer: Path | None = None
    statistics: Path | None = None
    scale: float | None = None
    labels: str | None = None


def convert(
    asked: Request,
    out: Path,
    registry: Registry | None = None,
    note: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write a run directory that ``Tokenizer`` or ``Generator.from_pretrained`` loads.

    Args:
        asked: what, and how.
        out: the directory; it must not hold anything.
        registry: what is installed; made afresh by default.
        note: told what was left out.

    Raises:
        StackFault: no such importer, a wrong option, or a place that is taken.
        DataFault: a file is broken, needs code to be read, or holds other tensors than the importer's.
    """
    registry = registry or Registry()
    importer = registry.load("importers", asked.format, "FORMAT")
    own, overrides = parted(asked.words)
    options = options_of(importer, asked.format, own, _settings(importer, asked.file, own, note))
    check_free(out)
    converted = _imported(importer, asked, options)
    if converted.left:
        note(f"left out, as they belong to others: {_told(converted.left)}")
    made = composed(converted, asked.format, asked.tokenizer, overrides, registry)
    statistics = statistics_of(made, asked.statistics, asked.scale)
    labels = _labels(asked.labels, converted.classes)
    _write(out, made, statistics, labels, asked)
    return out


def _imported(importer: Any, asked: Request, options: dict[str, Any]) -> Converted:
    tensors, left = _tensors(importer, asked)
    try:
        converted: Converted = importer.convert(tensors, **options)
    except Mismatch as error:
        raise Mismatch(f"{asked.file} holds other tensors than {asked.format}'s\n{error}") from error
    except Fault:
        raise
    except (ValueError, LookupError) as error:
        raise DataFault(
            f"{asked.file} as {asked.format}: {error}\noptions stand behind the file as key=value: vtp show "
            f"importers/{asked.format}"
        ) from error
    return replace(converted, left=(*converted.left, *left))


def _settings(
    importer: Any, file: Path, words: Sequence[str], note: Callable[[str], object]
) -> dict[str, Any]:
    """Options out of the ``config.json`` beside the file, where the importer knows such; those written win."""
    beside = file.parent / _CONFIG
    if not hasattr(importer, "settings") or not beside.is_file():
        return {}
    try:
        with beside.open("rb") as stream:
            config = json.loads(stream.read(_MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFault(f"{beside} beside {file.name} can't be read: {error}") from error
    written = {word.partition("=")[0] for word in words}
    found = importer.settings(config) if isinstance(config, dict) else {}
    found = {key: value for key, value in found.items() if key not in written}
    if found:
        note(f"of {beside}: {', '.join(f'{key}={value}' for key, value in found.items())}")
    return dict(found)


def _tensors(importer: Any, asked: Request) -> Taken:
    """The tensors of all files together, and the names that lie beside them."""
    holders = tuple(getattr(importer, "holders", ()))
    tensors, left = state_dict(read(asked.file), asked.file, asked.key, holders)
    for file in asked.beside:
        more, others = state_dict(read(file), file, None, holders)
        if both := sorted(tensors.keys() & more.keys()):
            raise DataFault(f"{asked.file} and {file} both have {_told(both)}")
        tensors, left = tensors | more, left + others
    return Taken(tensors, left)


def _labels(source: str | None, classes: int) -> list[str]:
    """Names of the labels that condition a generator: numbers where none are given."""
    if source is None:
        return [str(index) for index in range(classes)]
    if source == _IMAGENET:
        from torchvision.models import ResNet18_Weights

        found = [str(name) for name in ResNet18_Weights.DEFAULT.meta["categories"]]
    else:
        try:
            found = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataFault(
                f"--labels {source} can't be read: {error}; one name a line, or {_IMAGENET}"
            ) from error
    if len(found) != classes:
        raise StackFault(f"--labels {source}: {len(found)} names, but the network knows {classes} labels")
    return found


def _write(
    out: Path, made: Composed, statistics: dict[str, Tensor], labels: list[str], asked: Request
) -> None:
    parts = {**made.parts, "statistics": statistics} if statistics else made.parts
    source = {path.name: _sha256(path) for path in (asked.file, *asked.beside)}
    with RunDirectory.create(out, made.stack.config, made.stack.name) as run:
        checkpoint.save(run.checkpoints, 0, parts, {"step": 0})
        if made.model.condition is not None:
            run.write(names.FILE, names.encode_names({made.model.condition: labels}))
        run.mark("finished", converted={"format": asked.format, "files": source})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _told(found: Sequence[str]) -> str:
    """A few names of many."""
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
