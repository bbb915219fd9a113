"""Where the files of a VTP model are: a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vtp_core.errors import DataFault

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WANTED = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_OFFLINE = ("VTP_OFFLINE", "HF_HUB_OFFLINE")


def offline() -> str:
    """The variable that forbids the network; empty where it is allowed."""
    return next((n for n in _OFFLINE if os.environ.get(n, "").lower() not in {"", "0", "false", "no"}), "")


def is_id(source: str | Path) -> bool:
    """Whether this can only be an id on the hub: ``owner/name`` where no folder ``owner`` is."""
    text = str(source)
    return bool(_ID.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.exists()


def located(source: str | Path) -> Path:
    """The directory of ``source``; an id is fetched through ``huggingface_hub``, its safetensors and config only.

    Raises:
        DataFault: there is no such directory, or the hub does not give it, or the network is forbidden and the
            files are not in the local cache.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if not is_id(source):
        raise DataFault(f"there is no directory {source}; give a run, an export or a VTP directory")
    from huggingface_hub import snapshot_download

    local = offline()
    try:
        return Path(snapshot_download(str(source), allow_patterns=_WANTED, local_files_only=bool(local)))
    except Exception as error:  # huggingface_hub raises what its HTTP library does
        why = f"the network is forbidden ({local})" if local else str(error).splitlines()[0]
        raise DataFault(
            f"there is no directory {source}, and of the Hugging Face hub: {why}\n"
            f"fetch it where there is a network: hf download {source}"
        ) from error
