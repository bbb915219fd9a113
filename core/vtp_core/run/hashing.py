"""One hash of everything that a run resumes from: equal hashes, equal futures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from vtp_core.run import checkpoint, files


def state_hash(path: Path) -> str:
    """sha256 over name, type, shape and bytes of every tensor of a checkpoint, and over the rest of its state.

    How a checkpoint is cut into files changes nothing, so runs of any number of processes can be compared. Weights,
    EMA copies, centres and optimizers are tensors of it; the position in the data and every random draw are
    functions of its step and of the stack.

    Args:
        path: ``checkpoints/step-00000250``, or a run directory, of which the newest valid one is taken.

    Raises:
        StorageFault: the checkpoint is broken, or the run has none.
    """
    if (path / "checkpoints").is_dir():
        path = checkpoint.latest(path / "checkpoints") or path
    total = hashlib.sha256()
    for part, tensors in sorted(checkpoint.opened(path).items()):
        for name in sorted(tensors):
            tensor = tensors[name].detach().contiguous()
            total.update(f"{part}\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            if tensor.numel():
                total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # in place
    state = json.loads(files.read(path / "state.json"))
    total.update(json.dumps(state, sort_keys=True).encode())
    return total.hexdigest()
