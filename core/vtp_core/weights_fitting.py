"""A tower's file held against the network that its library builds: keys, shapes, dtypes and values."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core.converting.files import read, state_dict
from vtp_core.converting.values import check_values
from vtp_core.run.tensors import read_header
from vtp_core.weights_towers import Library
from vtp_plugins.importing import Mismatch, check_tensors, refuse

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fitted(library: Library, name: str, file: Path) -> dict[str, Tensor] | None:
    """Tensors of a file in its library's layout; None where the file itself is in it already.

    Args:
        library: whose network it is.
        name: of the network, with the tag of its weights.
        file: safetensors, or a state dict of torch's, also of the authors' layout where the library reads that.

    Raises:
        DataFault: it can't be read without running code.
        Mismatch: tensors are unknown, missing, of another shape or dtype, not finite, or all zero.
    """
    given = state_dict(read(file), file).tensors
    network = _network(library, name)
    wanted = network.state_dict()
    heads = _heads(network)
    alike = wanted.keys() - _under(heads, wanted) <= given.keys() <= wanted.keys()
    try:
        found = given if alike else _filtered(library, network, given)
        _check(found, wanted, heads)
        check_values(found, lambda: _network(library, name, "cpu").state_dict())
    except Mismatch as error:
        raise Mismatch(f"{file} holds other weights than {name}'s\n{error}") from error
    as_it_is = alike and file.suffix == ".safetensors" and read_header(file).keys() == found.keys()
    return None if as_it_is else {key: found[key].contiguous().clone() for key in sorted(found)}


def _network(library: Library, name: str, device: str = "meta") -> Any:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=False)
        import open_clip

        logging.disable(logging.WARNING)  # it warns of random weights
        try:
            return open_clip.create_model(name.partition(".")[0], load_weights=False, device=device)
        finally:
            logging.disable(logging.NOTSET)


def _heads(network: Any) -> tuple[str, ...]:
    """Prefixes of a classifier, which nothing here reads and a file may lack."""
    names = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _under(prefixes: tuple[str, ...], names: Mapping[str, Any]) -> set[str]:
    return {name for name in names if name.startswith(prefixes)} if prefixes else set()


def _filtered(library: Library, network: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' own layout in the library's, by the library itself; nothing is resampled."""
    wanted = network.state_dict()
    _refuse_resampling(given, wanted)
    if library == "open_clip":
        from open_clip.convert import convert_state_dict
        from open_clip.model import convert_to_custom_text_state_dict

        found = convert_state_dict(network, dict(given))
        older = "positional_embedding" in found and not hasattr(network, "positional_embedding")
        return dict(convert_to_custom_text_state_dict(found) if older else found)
    filters = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if filters is None:
        return dict(given)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it passes over
        found = dict(filters(dict(given), network))
    lost = {
        name: f"{tuple(tensor.shape)}"
        for name, tensor in given.items()
        if name.endswith("attn.qkv.bias") and not _kept(name, found) and tensor.any()
    }
    refuse({"not zero but without a place, which the name with _qkvb has": lost})
    return found


def _kept(name: str, found: Mapping[str, Tensor]) -> bool:
    return name in found or name.replace("qkv.bias", "q_bias") in found


def _refuse_resampling(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Positions and patches of another size would be resampled without a word."""
    shapes = {}
    for name, prefix_tokens in (("pos_embed", 1), ("patch_embed.proj.weight", 0)):
        if name in given and name in wanted:
            ours, theirs = tuple(wanted[name].shape), tuple(given[name].shape)
            axis = 1 if prefix_tokens else -1
            if len(ours) == len(theirs) and abs(ours[axis] - theirs[axis]) > prefix_tokens:
                shapes[name] = f"{theirs} for {ours}"
    refuse({"of another shape": shapes})


def _check(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], heads: tuple[str, ...]) -> None:
    absent = _under(heads, wanted) - found.keys()
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items() if name not in absent},
    )
    floats = {name for name, tensor in found.items() if tensor.dtype in _FLOATS}
    strange = {
        name: f"{tensor.dtype} for {wanted[name].dtype}".replace("torch.", "")
        for name, tensor in found.items()
        if (name in floats) != wanted[name].is_floating_point()
        or (name not in floats and tensor.dtype != wanted[name].dtype)
    }
    refuse({"of another dtype": strange})
