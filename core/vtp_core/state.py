"""Tensors of a model by checkpoint part, and the copies that an EMA teacher needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vtp_core.build import Model
from vtp_core.errors import PluginFault, StackFault
from vtp_core.teacher import EMATeacher

Parts = Mapping[str, Mapping[str, Tensor]]


def module_state(model: Model) -> dict[str, dict[str, Tensor]]:
    """``tokenizer``, ``generator``, ``modules/<name>``, ``objectives/<name>``: the tokenizer stands alone."""
    tokenizer: dict[str, Tensor] = {}
    for name, module in model.tokenizer_modules().items():
        tokenizer |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    parts = {"tokenizer": tokenizer}
    if model.generator is not None:
        parts["generator"] = dict(model.generator.state_dict())
    parts |= {f"modules/{name}": dict(module.state_dict()) for name, module in model.shared.items()}
    for name, objective in model.objectives.items():
        shared = shared_keys(model, objective)
        state = objective.state_dict().items()
        parts[f"objectives/{name}"] = {key: value for key, value in state if not key.startswith(shared)}
    return parts


def shared_keys(model: Model, objective: nn.Module) -> tuple[str, ...]:
    """Prefixes of an objective's keys that belong to the stack's ``modules``."""
    ids = {id(module) for module in model.shared.values()}
    return tuple(f"{name}." for name, module in objective.named_children() if id(module) in ids)


def load_modules(model: Model, parts: Parts) -> None:
    """The inverse of :func:`module_state`.

    Raises:
        StackFault: keys or shapes differ from the stack's modules.
    """
    load_tokenizer(model, parts["tokenizer"])
    if model.generator is not None:
        _load(model.generator, parts["generator"], "generator")
    for name, module in model.shared.items():
        _load(module, parts[f"modules/{name}"], f"modules/{name}")
    for name, objective in model.objectives.items():
        shared = shared_keys(model, objective)
        missing, unexpected = objective.load_state_dict(dict(parts[f"objectives/{name}"]), strict=False)
        missing = [key for key in missing if not key.startswith(shared)]
        if missing or unexpected:
            raise StackFault(f"objectives.{name}: missing {missing}, unexpected {list(unexpected)} in the checkpoint")


def load_tokenizer(model: Model, tensors: Mapping[str, Tensor]) -> None:
    """Encoder, bottleneck and decoder from one part; strict."""
    for name, module in model.tokenizer_modules().items():
        prefix = f"{name}."
        _load(module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, name)


def _load(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        lines = str(error).splitlines()[:20]
        raise StackFault(f"{where}: the weights do not fit the stack:\n" + "\n".join(lines)) from error


def shadowed(model: Model) -> dict[str, nn.Module]:
    """Modules that need an EMA copy: the encoder and bottleneck if a need reads ``ema``, and every ``shadow``."""
    found: dict[str, nn.Module] = {}
    wants = [o for ob in model.objectives.values() for n in ob.needs.values() if n.source == "ema" for o in n.want]
    if wants and model.encoder is not None:
        found["encoder"] = model.encoder
    if any(o.startswith("latent") or o == "posterior" for o in wants) and model.bottleneck is not None:
        found["bottleneck"] = model.bottleneck
    for name, objective in model.objectives.items():
        for child in objective.shadow:
            module = getattr(objective, child, None)
            if not isinstance(module, nn.Module):
                raise PluginFault(f"objectives.{name}: shadow names {child!r}, which is no submodule")
            found[f"objectives/{name}/{child}"] = module
    return found


def bind_shadows(model: Model, ema: EMATeacher) -> None:
    """Hand every objective its EMA copies."""
    for name, objective in model.objectives.items():
        objective.bind_shadows({child: ema.modules[f"objectives/{name}/{child}"] for child in objective.shadow})
