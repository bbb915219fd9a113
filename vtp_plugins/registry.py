"""Names to components over entry points: everything is listed, nothing is imported until it is named."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from vtp_plugins.errors import PluginFault, StackFault, suggestion

KINDS = (
    "modalities",
    "datasets",
    "views",
    "encoders",
    "bottlenecks",
    "decoders",
    "modules",
    "teachers",
    "objectives",
    "paths",
    "generators",
    "samplers",
    "probes",
    "hooks",
    "stacks",
    "importers",
)
_NAME = re.compile(r"[a-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Entry:
    """One installed name.

    Attributes:
        kind: its group, ``objectives`` and so on.
        name: the name a stack uses.
        target: ``module:Class``, or a package for stacks.
        distribution: who brings it, with the version.
        loaded: the class of a single-file plugin, whose code has run already.
    """

    kind: str
    name: str
    target: str
    distribution: str
    loaded: Any = field(default=None, repr=False, compare=False)

    def load(self) -> Any:
        """Import the target.

        Raises:
            PluginFault: the import fails, whatever it raises.
        """
        if self.loaded is not None:
            return self.loaded
        module, _, attribute = self.target.partition(":")
        try:
            loaded: Any = importlib.import_module(module)
            for part in attribute.split(".") if attribute else ():
                loaded = getattr(loaded, part)
        except (Exception, SystemExit) as error:
            raise PluginFault(
                f"{self.kind} {self.name!r} of {self.distribution} fails to import: "
                f"{type(error).__name__}: {error}. Mend or uninstall {self.distribution.split()[0]}"
            ) from error
        return loaded


class Registry:
    """What is installed, plus single-file plugins named on the command line.

    Args:
        files: Python files with a module-level ``PLUGINS = {"objectives": {"mine": Mine}}``.

    Attributes:
        files: the same, as paths.
    """

    def __init__(self, files: Iterable[Path | str] = ()) -> None:
        self.files = tuple(Path(file) for file in files)
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        self._scan()
        for file in self.files:
            self._add_file(file)

    def _scan(self) -> None:
        seen: set[str] = set()
        for distribution in importlib.metadata.distributions():
            name = distribution.metadata["Name"]
            if not name:  # what is left of a removal that went wrong
                continue
            plain = re.sub(r"[-_.]+", "-", name).lower()
            if plain in seen:  # found twice on the path; the first is what an import finds
                continue
            seen.add(plain)
            for point in _points(distribution):
                prefix, _, kind = point.group.partition(".")
                if prefix == "vtp_plugins" and kind in KINDS:
                    entry = Entry(kind, point.name, point.value, f"{name} {distribution.version}")
                    self._entries.setdefault((kind, point.name), []).append(entry)

    def _add_file(self, path: Path) -> None:
        plugins = getattr(_module_of(path), "PLUGINS", None)
        if not isinstance(plugins, dict) or not all(
            isinstance(classes, dict) for classes in plugins.values()
        ):
            raise PluginFault(f'--plugin {path}: write PLUGINS = {{"objectives": {{"name": Class}}}}')
        for kind, classes in plugins.items():
            if kind not in KINDS:
                raise PluginFault(f"--plugin {path}: unknown kind {kind!r}{suggestion(str(kind), KINDS)}")
            for name, cls in classes.items():
                target = f"{path}:{getattr(cls, '__qualname__', cls)}"
                entry = Entry(kind, name, target, f"{path} (file)", cls)
                self._entries.setdefault((kind, name), []).append(entry)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Everything installed of a kind, or of all kinds, by name; doubled names appear twice."""
        found = [entry for entries in self._entries.values() for entry in entries]
        return sorted(
            (e for e in found if kind in (None, e.kind)), key=lambda e: (KINDS.index(e.kind), e.name)
        )

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return sorted(name for k, name in self._entries if k == kind)

    def find(self, kind: str, name: str, key: str = "") -> Entry:
        """The entry behind a name, without importing it.

        Args:
            kind: one of ``KINDS``.
            name: what the stack says.
            key: where the stack says it, for the message.

        Raises:
            StackFault: the name is not installed.
            PluginFault: two distributions offer it.
        """
        where = f"{key}: " if key else ""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            near = suggestion(str(name), self.names(kind))
            raise StackFault(f"{where}{name!r} is no name; names resolve through the registry only{near}")
        entries = self._entries.get((kind, name), [])
        if not entries:
            raise StackFault(f"{where}no {kind} {name!r} is installed{suggestion(name, self.names(kind))}")
        if len(entries) > 1:
            owners = " and ".join(entry.distribution for entry in entries)
            raise PluginFault(f"{kind} {name!r} comes from both {owners}; uninstall one")
        return entries[0]

    def load(self, kind: str, name: str, key: str = "") -> Any:
        """The class behind a name; see :meth:`find` and :meth:`Entry.load`."""
        return self.find(kind, name, key).load()


def _points(distribution: importlib.metadata.Distribution) -> Iterable[importlib.metadata.EntryPoint]:
    """Its entry points; none where the file cannot be read, which breaks nobody else."""
    try:
        return distribution.entry_points
    except (OSError, ValueError):
        return ()


def _module_of(path: Path) -> ModuleType:
    """Import a single-file plugin under a name of its own."""
    if not path.is_file() or path.suffix != ".py":
        raise PluginFault(
            f"--plugin {path}: no such file" if not path.is_file() else f"--plugin {path}: no .py file"
        )
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"vtp_file_{re.sub(r'[^a-z0-9_]', '_', path.stem.lower())}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginFault(f"--plugin {path} fails to import: {type(error).__name__}: {error}") from error
    return module
