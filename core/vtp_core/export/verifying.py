"""``vtp verify``: load a directory in a process of its own, encode and decode, and tell what came out.

Run as a module it is that process: one argument, the directory, and one line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vtp_core.errors import DataFault, Fault
from vtp_core.export.foreign_config import is_onnx

_LONGEST = 600  # seconds
_SEED = 0


def verify(path: Path) -> dict[str, Any]:
    """Check that a directory is loaded by a process that knows nothing else.

    Returns:
        ``tokenizer``, ``latents`` and ``decoded`` (sha256), ``shape`` of the latents, whether it has
        ``statistics``, ``exports``; of an export to ONNX hashes of what its graphs give, and ``onnxruntime``.

    Raises:
        Fault: what the process met, with its exit code.
    """
    command = [sys.executable, "-m", "vtp_core.export.verifying", str(path)]
    environment = {**os.environ, "VTP_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST, check=False, env=environment
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise DataFault(f"{path}: loading took longer than {_LONGEST} s") from error
    except (ValueError, IndexError) as error:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise DataFault(f"{path}: the process that loaded it ended: {last[0]}") from error
    if "fault" in found:
        fault = Fault(found["fault"])
        fault.code = int(found["code"])
        raise fault
    return found


def looked_at(path: Path) -> dict[str, Any]:
    """What :func:`verify` tells, in this process."""
    if is_onnx(path):
        from vtp_core.export.onnx_session import looked_at as looked_at_graphs

        return looked_at_graphs(path)
    import torch

    from vtp_core.statistics import digest, hashed, hexed
    from vtp_core.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(path)
    size = tokenizer.spec.size
    drawn = torch.Generator().manual_seed(_SEED)
    images = torch.rand(2, tokenizer.spec.signal_channels, *size, generator=drawn)
    with torch.no_grad():
        z = tokenizer.encode(images)
        made = {"latents": z}
        if hasattr(tokenizer, "decoder"):
            made["decoded"] = tokenizer.decode(z)
    finite = all(bool(value.isfinite().all()) for value in made.values())
    if not finite:
        raise DataFault(f"{path}: its latents or pictures are not finite")
    return {
        "tokenizer": hexed(digest(tokenizer.state_dict())),
        **{name: hexed(hashed({name: value})) for name, value in made.items()},
        "shape": list(z.shape),
        "statistics": bool(tokenizer.statistics),
        "exports": [name for name in ("embed_image", "embed_text") if tokenizer.exports(name)],
    }


def main(path: Path) -> None:
    """The process: tells what it found, or the fault that it met."""
    try:
        found = looked_at(path)
    except Fault as fault:
        found = {"fault": str(fault), "code": fault.code}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
