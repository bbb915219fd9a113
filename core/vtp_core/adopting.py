"""Starting from an earlier run: its tokenizer's weights, statistics and exports go into a new one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtp_core.build import Model
from vtp_core.errors import DataFault, StackFault, suggestion
from vtp_core.exporters import exporting
from vtp_core.run.checkpoint import latest, load
from vtp_core.stack import Stack
from vtp_core.state import Parts, load_tokenizer, module_state, shadowed, shared_keys
from vtp_core.statistics import check, digest
from vtp_core.tokenizer import chosen, read_run

if TYPE_CHECKING:
    from vtp_plugins.objective import Objective
    from vtp_plugins.protocols import Dataset

EXPORTS = "exports/"
"""Checkpoint parts of objectives that are not trained but travel with the tokenizer."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """The run that ``tokenizer.from`` names, read into memory."""

    path: Path
    parts: Parts
    weights: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Of encoder, bottleneck and decoder, those of the EMA teacher where asked."""
        return chosen(self.parts, self.weights)


def earlier(stack: Stack) -> Earlier | None:
    """What the stack starts from; None for a stack that starts from nothing."""
    keys = stack.tokenizer
    if keys.from_ is None:
        return None
    return Earlier(Path(keys.from_), read_run(Path(keys.from_), registry=stack.registry)[1], keys.weights)


def beginning(stack: Stack, resume: Path | None) -> tuple[Earlier | None, dict[str, Any]]:
    """What to start from, None for a run that has a checkpoint; and the parts that are carried along."""
    found = latest(resume / "checkpoints") if resume else None
    if found is not None:
        names = [EXPORTS + name for name in stack.tokenizer.exports]
        return None, dict(load(found, verify=False, only=names)[0]) if names else {}
    source = earlier(stack)
    return source, exports_of(stack, source) if source else {}


def conditioning(stack: Stack, dataset: Dataset, exporters: Mapping[str, Objective]) -> tuple[int, int]:
    """Labels of the generator's condition, and E of its embeddings; 0 for what it does not have."""
    name = stack.generator.condition
    if name is None or name in dataset.names:
        return len(dataset.names.get(name or "label", ())), 0
    if stack.config.get("generator") is None:
        return 0, 0
    if name not in dataset.fields | dataset.provides:
        raise StackFault(
            f"generator.condition: the data has no {name!r}{suggestion(name, dataset.fields)}; null is none"
        )
    embed = embedding(exporters)
    if embed is None:
        raise StackFault(
            f"generator.condition: {name!r} is no label of the data ({', '.join(dataset.names) or 'it has none'}), "
            "and the tokenizer exports no embed_text to embed it"
        )
    return 0, embed([""]).shape[1]


def embedding(exporters: Mapping[str, Objective]) -> Callable[[Sequence[str]], Tensor] | None:
    """What embeds texts, (n, E), L2-normalised; None where nothing does."""
    found: Any = next((o for o in exporters.values() if "embed_text" in o.exports), None)
    if found is None:
        return None
    return torch.no_grad()(lambda texts: found.embed_text(list(texts)))


def settled(stack: Stack) -> Stack:
    """The stack whose ``tokenizer.exports`` has only objectives that export something and are installed."""
    if not stack.tokenizer.exports:
        return stack
    config = copy.deepcopy(stack.config)
    kept = exporting(stack, stack.tokenizer.exports)
    config["tokenizer"]["exports"] = {name: stack.tokenizer.exports[name] for name in kept}
    return replace(stack, config=config)


def exports_of(stack: Stack, source: Earlier) -> dict[str, Mapping[str, Tensor]]:
    """Checkpoint parts of what the new tokenizer exports without training it."""
    found = {}
    for name in stack.tokenizer.exports:
        part = source.parts.get(f"objectives/{name}", source.parts.get(EXPORTS + name))
        if part is None:
            raise DataFault(f"tokenizer.from: {source.path} has no weights of objectives.{name}")
        found[EXPORTS + name] = part
    return found


def adopt(model: Model, source: Earlier) -> list[str]:
    """Load the earlier weights into the tokenizer's modules and into objectives that export something.

    Returns:
        What is new: modules without earlier weights, objectives with weights that do not go on from earlier
        ones, and the EMA teacher, which begins as a copy.

    Raises:
        StackFault: the weights do not fit the modules that the stack writes.
        DataFault: statistics of another tokenizer.
    """
    tensors = source.tensors
    owners = {name.partition(".")[0] for name in tensors}
    modules = model.tokenizer_modules()
    known = [name for name, module in modules.items() if name in owners or not module.state_dict()]
    without: dict[str, Any] = {name: None for name in modules if name not in known}
    load_tokenizer(replace(model, **without), tensors)
    statistics = dict(source.parts.get("statistics", {}))
    if statistics and keeps_latents(model) and source.weights == "student":  # an average has others
        check(statistics, tensors, f"{source.path}: the latent statistics", f"vtp resume {source.path}")
        model.statistics = {**statistics, "of": digest(tensors)}
    new = [name for name in modules if name not in known]
    new += [f"modules.{name}" for name in model.shared] + _begun(model, source)
    return [*new, "the EMA teacher (a copy)"] if shadowed(model) else new


def _begun(model: Model, source: Earlier) -> list[str]:
    """Load what earlier objectives export; returns objectives that train weights of their own from scratch."""
    new = []
    for name, objective in model.objectives.items():
        shared = shared_keys(model, objective)
        own = {k: v for k, v in objective.state_dict().items() if not k.startswith(shared)}
        part = source.parts.get(f"objectives/{name}", source.parts.get(EXPORTS + name, {}))
        shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (own, part)]
        if objective.exports and shapes[0] == shapes[1]:
            objective.load_state_dict(dict(part), strict=False)
        elif any(p.requires_grad and not n.startswith(shared) for n, p in objective.named_parameters()):
            new.append(f"objectives.{name}")
    return new


def keeps_latents(model: Model) -> bool:
    """Whether nothing that makes the latent trains."""
    made = {name for name in ("encoder", "bottleneck") if name in model.tokenizer_modules()}
    trains: Any = [model.tokenizer_modules()[name] for name in made - model.frozen]
    return not any(parameter.requires_grad for module in trains for parameter in module.parameters())


def check_latents(model: Model, dataset: Dataset) -> None:
    """A generator never sees latents that are not standardised, or another tokenizer's.

    Raises:
        StackFault: the latent still moves, and nothing normalises it.
        DataFault: the data's latents are of another tokenizer.
    """
    found: Tensor | None = getattr(dataset, "tokenizer_digest", None)
    if "latent" in dataset.provides and found is not None:
        own = digest(module_state(model)["tokenizer"])
        if not torch.equal(own, found):
            raise DataFault(
                "data: these latents are of another tokenizer than tokenizer.from; write them again: vtp latents"
            )
    links: Any = () if model.bottleneck is None else model.bottleneck.links
    normalised = any(getattr(link, "normalises", False) for link in links)
    if model.generator is not None and not normalised and not keeps_latents(model):
        raise StackFault(
            "generator: its latents are not standardised: freeze the tokenizer "
            "(tokenizer.frozen=[encoder,bottleneck]), or end the bottleneck with a link that normalises: rms_norm"
        )


def lacks_statistics(model: Model) -> bool:
    """Whether a generator is to be trained on a frozen tokenizer whose statistics nobody has computed."""
    return model.generator is not None and keeps_latents(model) and not model.statistics
