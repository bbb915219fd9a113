"""Tensors of a model by checkpoint part, and the copies that an EMA teacher needs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vtp_core import shards
from vtp_core.blueprint import Blueprint
from vtp_core.build import Model, tokenizer_only
from vtp_core.errors import PluginFault, StackFault
from vtp_core.planner import LATENT, family
from vtp_core.run.saved import under
from vtp_core.teacher import EMATeacher

Parts = Mapping[str, Mapping[str, Tensor]]
_ALIGNMENT = 64  # bytes


def module_state(model: Model) -> dict[str, dict[str, Tensor]]:
    """``tokenizer``, ``generator``, ``modules/<name>``, ``objectives/<name>``, as this process holds them.

    A module with several users is saved once.
    """
    tokenizer: dict[str, Tensor] = {}
    for name, module in model.tokenizer_modules().items():
        tokenizer |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    parts = {"tokenizer": tokenizer}
    for name, module in _others(model).items():
        shared = shared_keys(model, module)
        parts[name] = {key: value for key, value in module.state_dict().items() if not key.startswith(shared)}
    return parts


def _others(model: Model) -> dict[str, nn.Module]:
    """Modules beside the tokenizer, by checkpoint part."""
    named = {} if model.generator is None else {"generator": model.generator}
    named |= {f"modules/{name}": module for name, module in model.shared.items()}
    return named | {f"objectives/{name}": objective for name, objective in model.objectives.items()}


def shared_keys(model: Model, module: nn.Module) -> tuple[str, ...]:
    """Prefixes of a module's keys that another part saves: the tokenizer's, the stack's ``modules``'."""
    owned = {id(m) for m in (*model.tokenizer_modules().values(), *model.shared.values()) if m is not module}
    inner = module.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, child in inner if name and id(child) in owned)


def load_modules(model: Model, parts: Parts) -> None:
    """The inverse of :func:`module_state`.

    Raises:
        StackFault: keys or shapes differ from the stack's modules.
    """
    load_tokenizer(model, parts.get("tokenizer", {}))
    for name, module in _others(model).items():
        shared = shared_keys(model, module)
        missing, unexpected = _fill(module, parts.get(name, {}), name, strict=False)
        missing = [key for key in missing if not key.startswith(shared)]
        if missing or unexpected:
            raise StackFault(f"{name}: missing {missing}, unexpected {unexpected} in the checkpoint")


def loaded_tokenizer(plans: Blueprint, tensors: Mapping[str, Tensor]) -> Model:
    """A tokenizer with these weights; core's own modules take the tensors themselves, so no second copy is made.

    Raises:
        StackFault: keys or shapes differ from the stack's modules.
    """
    components = [plans.modality, plans.encoder, *plans.links, plans.decoder]
    # modules of others may keep constants that the meta device would lose
    own = all(c is None or c.cls.__module__.startswith(f"{__package__}.") for c in components)
    with torch.device("meta") if own else contextlib.nullcontext():
        model = tokenizer_only(plans)
    load_tokenizer(model, tensors, assign=own)
    return model


def load_tokenizer(model: Model, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
    """Encoder, bottleneck and decoder from one part; strict.

    Args:
        model: whose modules they are.
        tensors: by ``encoder...`` and so on.
        assign: put the tensors themselves into the modules, in the modules' dtypes.
    """
    for name, module in model.tokenizer_modules().items():
        own = under(tensors, f"{name}.")
        if assign:
            dtypes = {key: value.dtype for key, value in module.state_dict().items()}
            own = {key: _aligned(value.to(dtypes.get(key, value.dtype))) for key, value in own.items()}
        _fill(module, own, name, assign=assign)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch itself would put one: matrix products round differently at odd addresses."""
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], where: str, strict: bool = True, assign: bool = False
) -> tuple[list[str], list[str]]:
    try:
        given = shards.dealt(module.state_dict(), tensors)
        found = module.load_state_dict(dict(given), strict=strict, assign=assign)
        return list(found.missing_keys), list(found.unexpected_keys)
    except RuntimeError as error:
        lines = str(error).splitlines()[:20]
        raise StackFault(f"{where}: the weights do not fit the stack:\n" + "\n".join(lines)) from error


def shadowed(model: Model) -> dict[str, nn.Module]:
    """Modules that need an EMA copy: encoder and bottleneck if a need reads them, and every ``shadow``."""
    found: dict[str, nn.Module] = {}
    needs = [need for objective in model.objectives.values() for need in objective.needs.values()]
    wants = {family(output) for need in needs if need.source == "ema" for output in need.want}
    if wants and model.encoder is not None:
        found["encoder"] = model.encoder
    if wants & LATENT and model.bottleneck is not None:
        found["bottleneck"] = model.bottleneck
    for name, objective in model.objectives.items():
        for child in objective.shadow:
            module = getattr(objective, child, None)
            if not isinstance(module, nn.Module):
                raise PluginFault(f"objectives.{name}: shadow names {child!r}, which is no submodule")
            found[f"objectives/{name}/{child}"] = module
    return found


def averaged(model: Model) -> dict[str, nn.Module]:
    """The generator, where the stack wants its average."""
    if model.generator is None or model.stack.generator.ema is None:
        return {}
    return {"generator": model.generator}


def bind_shadows(model: Model, ema: EMATeacher) -> None:
    """Hand every objective its EMA copies."""
    for name, objective in model.objectives.items():
        objective.bind_shadows(
            {child: ema.modules[f"objectives/{name}/{child}"] for child in objective.shadow}
        )
