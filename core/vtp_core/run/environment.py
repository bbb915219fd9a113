"""What a run records of its surroundings: an allow-list, so that nothing private gets in by accident."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGES = frozenset(
    {
        "lpips", "numpy", "omegaconf", "open-clip-torch", "pillow", "pluggy", "pydantic", "safetensors",
        "tensorboard", "timm", "torch", "torch-fidelity", "torchvision", "webdataset",
    }
)  # fmt: skip
# A token is a secret, but not of a tokenizer, a mask, a class, ...
_SECRET = re.compile(
    r"(?i)(?<!mask_)(?<!cls_)(?<!class_)(?<!pad_)(?<!eos_)(?<!bos_)token(?!i[sz])"
    r"|secret|passw|api_?key|credential"
)
_URL_USER = re.compile(r"(?<=://)[^/?#\s@]+(?=@)")
_URL_QUERY = re.compile(r"(://[^?\s]*\?)\S+")
_MASK = "***"
_SHORTEST = 8  # shorter values of the environment are no secrets, and masking them would garble text


def capture(seed: int | None = None, data: str | None = None) -> dict[str, Any]:
    """The surroundings of a run: versions and machine, no environment variable, path, user or host.

    Args:
        seed: of the run.
        data: fingerprint of the dataset.
    """
    return {
        "seed": seed,
        "data": data,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": {
            "system": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "torch": _torch(),
        "packages": _packages(),
        "commit": _commit(Path(__file__).parent),
    }


def masked(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """A copy of plain data in which secrets are ``***``.

    Masked are entries under keys that name a secret, values of environment variables that do, and the
    user and query of a URL. ``tokens: 256`` stays, as it counts something else.
    """
    values = {entry for name, entry in environment.items() if _SECRET.search(name)}
    secrets = sorted((entry for entry in values if len(entry) >= _SHORTEST), key=len, reverse=True)
    return _masked(value, secrets, hidden=False)


def _masked(value: Any, secrets: list[str], hidden: bool) -> Any:
    if isinstance(value, Mapping):
        return {
            key: _masked(entry, secrets, hidden or _names_secret(key, entry)) for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked(entry, secrets, hidden) for entry in value]
    if hidden and value is not None and not isinstance(value, bool):
        return _MASK
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, _MASK)
        return _URL_QUERY.sub(rf"\1{_MASK}", _URL_USER.sub(_MASK, value))
    return value


def _names_secret(key: object, entry: object) -> bool:
    found = {word.lower() for word in _SECRET.findall(str(key))}
    harmless = found == {"token"} and isinstance(
        entry, int | float | Mapping
    )  # a count, a component so named
    return bool(found) and not harmless


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def _packages() -> dict[str, str]:
    """Versions of our distributions and of the libraries that decide numbers."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name in _PACKAGES or name.startswith("vtp-"):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that this code runs from, with ``-dirty`` if changed; None outside one."""
    git = shutil.which("git")
    if git is None or "site-packages" in folder.parts:
        return None
    command = [git, "-c", "core.fsmonitor=false", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
