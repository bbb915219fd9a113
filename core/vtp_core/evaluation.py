"""Probes of a stack on a tokenizer: during training, at its end, and again on a finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtp_core import options
from vtp_core.components import Component, resolve
from vtp_core.errors import StackFault
from vtp_core.probes import run_probes
from vtp_core.probes.bench import Bench
from vtp_core.stack import Stack
from vtp_core.tokenizer import Tokenizer
from vtp_plugins.spec import Spec

if TYPE_CHECKING:
    from vtp_plugins.protocols import Dataset, Probe
    from vtp_plugins.reading import Reading
    from vtp_plugins.registry import Registry


def dataset_component(stack: Stack) -> Component:
    """The stack's dataset with its options checked, not built."""
    node = stack.config.get("data")
    if node is None:
        raise StackFault("the stack names no data; write data: {use: emoji}")
    return resolve(stack.registry, "datasets", "data", node, stack.dial, taken=options.DATA_KEYS)


def dataset_factory(stack: Stack, spec: Spec) -> Callable[[str | None], Dataset]:
    """Split name to dataset; None is the split that is trained on.

    Args:
        stack: names the dataset.
        spec: of the tokenizer; a dataset may shrink pictures that are far larger than its size.
    """
    return _maker(dataset_component(stack), spec)


def _maker(component: Component, spec: Spec) -> Callable[[str | None], Dataset]:
    def make(split: str | None = None) -> Dataset:
        dataset: Dataset = component.build(spec) if split is None else component.build(spec, split=split)
        return dataset

    return make


def probed_factory(
    stack: Stack, spec: Spec, trained: Callable[[str | None], Dataset] | None = None
) -> Callable[[str | None], Dataset]:
    """The data that probes look at: the stack's, or the tokenizer's own where the stack's has no signals.

    Args:
        stack: names the data.
        spec: of the tokenizer.
        trained: makes the stack's own datasets, if it is there already.
    """
    trained = trained or dataset_factory(stack, spec)
    node = stack.tokenizer.data
    if node is None or not trained(None).provides:
        return trained
    component = resolve(
        stack.registry, "datasets", "tokenizer.data", node, stack.dial, taken=options.DATA_KEYS
    )
    return _maker(component, spec)


def probe_components(stack: Stack) -> dict[str, Component]:
    """The stack's probes with their options checked."""
    found = {}
    for name, node in stack.section("probes").items():
        key, taken = f"probes.{name}", options.PROBE_KEYS
        found[name] = resolve(stack.registry, "probes", key, node, stack.dial, taken=taken)
    return found


def build_probes(stack: Stack, spec: Spec) -> dict[str, Probe]:
    """The stack's probes, built."""
    return {name: component.build(spec) for name, component in probe_components(stack).items()}


def due(stack: Stack, step: int) -> list[str]:
    """Probes that run after ``step`` steps; the last step runs all of them."""
    steps = stack.train.steps
    if step == steps:
        return list(stack.section("probes"))
    names = []
    for name, node in stack.section("probes").items():
        every = options.Probe.model_validate({k: v for k, v in node.items() if k in options.PROBE_KEYS}).every
        if every is not None and step % max(options.steps_of(every, steps), 1) == 0:
            names.append(name)
    return names


def evaluate(run: Path, stack: Stack, limit: int | None = None) -> tuple[list[Reading], list[str]]:
    """All probes of a stack on a run's tokenizer.

    Args:
        run: a run directory.
        stack: its stack, perhaps with overrides of ``probes`` or ``data``.
        limit: samples per split, at most.
    """
    if not stack.section("probes"):
        raise StackFault("the stack names no probes; write what to take, such as probes.reconstruction={}")
    generator = None
    if stack.config.get("generator") is not None:
        from vtp_core.generation import Generator  # which needs this module's neighbours

        generator = Generator.of_stack(stack, run)
    tokenizer = generator.tokenizer if generator else Tokenizer.from_pretrained(run, registry=stack.registry)
    probes = build_probes(stack, tokenizer.spec)
    bench = Bench(tokenizer, probed_factory(stack, tokenizer.spec), limit=limit)
    return measured(tokenizer, probes, bench, generator)


def measured(
    tokenizer: Tokenizer, probes: Mapping[str, Probe], bench: Bench, generator: Any = None
) -> tuple[list[Reading], list[str]]:
    """Readings of all probes, and a line for each that was left out and each split with broken samples.

    Args:
        tokenizer: in eval mode.
        probes: by instance name.
        bench: of that tokenizer.
        generator: a ``vtp_core.generation.Generator`` over that tokenizer, where the stack has one.
    """
    readings, left_out = run_probes(tokenizer, probes, bench, generator)
    skipped = {split: count for split, count in bench.skipped.items() if count}
    return readings, left_out + [f"split {s}: {n} samples could not be read" for s, n in skipped.items()]


def as_row(reading: Reading) -> dict[str, Any]:
    """A reading as a row of ``probes.jsonl`` and of ``vtp eval --json``."""
    return {
        "probe": reading.probe, "split": reading.split, "value": reading.value, "n": reading.n,
        "protocol": reading.protocol,
    }  # fmt: skip


def bench_of(run: Path, registry: Registry | None = None, **keys: Any) -> tuple[Tokenizer, Bench]:
    """The tokenizer of a run and the bench over its data.

    Args:
        run: a run directory.
        registry: what the names of its stack mean; by default what is installed.
        **keys: ``limit``, ``batch_size`` and other keys of :class:`Bench`.
    """
    tokenizer = Tokenizer.from_pretrained(run, registry=registry)
    return tokenizer, Bench(tokenizer, probed_factory(tokenizer.stack, tokenizer.spec), **keys)
