"""Measuring a run while it trains: probes on the student as it is, and the statistics of its latent."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_core import distributed, evaluation
from vtp_core.adopting import keeps_latents
from vtp_core.generation import Generator
from vtp_core.probes.bench import Bench
from vtp_core.run import metrics
from vtp_core.run.metrics import JsonLines
from vtp_core.state import module_state
from vtp_core.statistics import digest, latent_statistics
from vtp_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vtp_core.build import Model
    from vtp_core.engine import Engine
    from vtp_core.stopping import Stopping
    from vtp_plugins.protocols import Dataset, Probe
    from vtp_plugins.reading import Reading


class Measuring:
    """Takes probes of one run and records them; a signal may end it at any point.

    Args:
        engine: of the run.
        probes: by instance name.
        dataset: makes the dataset of a split.
        rows: ``probes.jsonl``.
        stopping: told when a signal may raise.
        exporters: objectives that export something but are not trained here.
        names: label names that condition the generator.
    """

    def __init__(
        self, engine: Engine, probes: Mapping[str, Probe], dataset: Callable[[str | None], Dataset],
        rows: JsonLines, stopping: Stopping, exporters: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.engine, self.probes, self.dataset = engine, probes, dataset
        self.rows, self.stopping = rows, stopping
        self.exporters, self.names = dict(exporters or {}), names

    def taken(self, step: int) -> bool:
        """Whether probes were taken at a step, as the first process finds: it alone writes that down."""
        rows = metrics.read(self.rows.path) if self.engine.rank == 0 and self.rows.path.exists() else []
        return distributed.told("yes" if any(row.get("step") == step for row in rows) else "no") == "yes"

    @torch.no_grad()
    def measure(self, names: Sequence[str], note: Callable[[str], object]) -> None:
        """Take probes and record them; training mode is restored.

        Every process takes them, on the same weights and data, as one that waited would look dead; the first records.

        Args:
            names: which.
            note: told what was left out.
        """
        if not names:
            return
        with self.engine.whole() as (model, average):
            modules = list(model.modules().values())
            for module in modules:
                module.eval()
            tokenizer, bench = self._tokenizer(model)
            with self.stopping.resting():
                probes = {n: self.probes[n] for n in names}
                generator = self.generator(tokenizer, average)
                readings, left_out = evaluation.measured(tokenizer, probes, bench, generator)
            for module in modules:
                module.train()
        if self.engine.rank != 0:
            return
        step = self.engine.steps_done
        for reading in readings:
            self.rows.append({"step": step, **evaluation.as_row(reading)})
        for line in [*summaries(readings), *left_out]:
            note(f"step {step} | {line}")
        self.engine.plugins.hook.vtp_probe(engine=self.engine, step=step, readings=readings)

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of the latent, if the run trains what makes it."""
        model = self.engine.model
        if model.encoder is None or keeps_latents(model):
            return {}
        if model.generator is not None:  # which saw the latent as the bottleneck normalises it
            channels = model.spec.channels
            with self.engine.whole() as (whole, _):
                own = digest(module_state(whole)["tokenizer"])
            return {
                "mean": torch.zeros(channels),
                "std": torch.ones(channels),
                "count": torch.tensor(0),
                "of": own,
            }
        return self.computed()

    @torch.no_grad()
    def computed(self) -> dict[str, Tensor]:
        """Statistics of the latent as it is, over the data that probes look at."""
        with self.engine.whole() as (model, _):
            modules = list(model.tokenizer_modules().values())
            before = [module.training for module in modules]
            for module in modules:
                module.eval()
            with self.stopping.resting():
                found = latent_statistics(*self._tokenizer(model))
            for module, mode in zip(modules, before, strict=True):
                module.train(mode)
        return found

    def generator(self, tokenizer: Tokenizer, average: nn.Module | None) -> Generator | None:
        """The live generator, its average where there is one; None where there is none."""
        if self.engine.model.generator is None:
            return None
        hooks = dict(self.engine.plugins.list_name_plugin())
        kept = {
            name: hook for name, hook in hooks.items() if hasattr(hook, "vtp_sample") and name != "defaults"
        }
        weights = "student" if average is None else "ema"
        weak = self._weak()
        return Generator(tokenizer, average, names=self.names, hooks=kept, weak=weak, weights=weights)

    @functools.cache  # noqa: B019 - one object a run
    def _weak(self) -> Any:
        """The weaker generator that guidance compares with, read once."""
        weak = self.engine.model.stack.sampler.weak
        device = str(self.engine.device)
        return None if weak is None else Generator.from_pretrained(weak, device=device).network

    def _tokenizer(self, model: Model) -> tuple[Tokenizer, Bench]:
        """The modules as a tokenizer, and the data beside it."""
        tokenizer = Tokenizer(model, {**self.exporters, **model.objectives})
        device, pause = self.engine.device, self.stopping.pause
        return tokenizer, Bench(tokenizer, self.dataset, device=device, pause=pause)


def summaries(readings: Sequence[Reading]) -> list[str]:
    """One line for each probe and split: what it read, in the order it did."""
    lines: dict[tuple[str, str], list[str]] = {}
    for reading in readings:
        probe, _, name = reading.probe.partition("/")
        lines.setdefault((probe, reading.split), []).append(f"{name or probe} {reading.value:.4g}")
    return [f"{probe} {split}: {', '.join(values)}" for (probe, split), values in lines.items()]
