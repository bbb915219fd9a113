"""Sampling from a trained generator: labels or texts to pictures, each a function of the seed and its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtp_core import adopting
from vtp_core.build import Model, blueprint, build, without_training
from vtp_core.clock import GivenClock, StepClock
from vtp_core.components import resolve
from vtp_core.conditions import Conditions
from vtp_core.describe_sampling import DEFAULT, protocol_of
from vtp_core.errors import DataFault, Fault, StackFault
from vtp_core.exporters import exporters_of
from vtp_core.hooks import manager_of
from vtp_core.run.names import names_of
from vtp_core.samplers.field import Field
from vtp_core.samplers.guidance import Guidance
from vtp_core.samplers.reuse import Reuse
from vtp_core.samplers.templates import fitted
from vtp_core.stack import Stack, load_run_stack
from vtp_core.state import load_modules
from vtp_core.tokenizer import Tokenizer, read_run
from vtp_core.validation import validated
from vtp_plugins.registry import Registry

TEMPLATES = 8  # samples on which the best steps for reuse are found (arXiv 2504.05741)


class Generator:
    """A generator beside its tokenizer.

    Args:
        tokenizer: decodes, and has the statistics of the latent.
        network: what samples; None takes the model's generator.
        names: label names, for ``label`` by name.
        hooks: hook plugins by name; ``vtp_sample`` goes through them.
        weak: the network that ``guidance.use: auto`` compares with.
        weights: what ``network`` is, for the protocol.

    Attributes:
        evaluations: forwards of the generator per sample in the last call, both branches of guidance as one.
        refreshes: how many of these ran its encoder too; all without ``reuse``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        network: Any = None,
        *,
        names: Sequence[str] = (),
        hooks: Mapping[str, Any] | None = None,
        weak: Any = None,
        weights: str = "student",
    ) -> None:
        self.tokenizer, self.model, self.weights = tokenizer, tokenizer.model, weights
        self.network: Any = network if network is not None else self.model.generator
        if self.network is None:
            raise StackFault(
                "this run has no generator; train one: vtp train lightningdit-tiny tokenizer.from=RUN"
            )
        self.names, self.weak = tuple(names), weak
        embed = self.model.embed or (
            tokenizer.embed_text if self.model.spec.condition == "embedding" else None
        )
        self.conditions = Conditions(self.spec, self.condition, self.names, embed, tokenizer.device)
        self.relay = manager_of(hooks or {}).hook
        self.sampler = self.model.sampler or _default_sampler(self.model)
        self.evaluations = self.refreshes = 0
        self._reuse: Reuse | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, weights: str | None = None, device: str = "cpu", overrides: Sequence[str] = (),
        registry: Registry | None = None,
    ) -> Generator:  # fmt: skip
        """Load a generator and its tokenizer from a run.

        Args:
            path: a run directory whose stack has a generator.
            weights: ``ema`` or ``student``; None takes the average where the run kept one.
            device: where to put both.
            overrides: of the run's stack, such as ``sampler.steps=20``.
            registry: what its names mean; by default what is installed.

        Raises:
            DataFault: nothing loadable is there.
            StackFault: the run has no generator, or not those weights.
        """
        stack = load_run_stack(Path(path), registry or Registry(), overrides)
        return cls.of_stack(stack, Path(path), weights, device)

    @classmethod
    def of_stack(cls, stack: Stack, run: Path, weights: str | None = None, device: str = "cpu") -> Generator:
        """The same of a run whose stack is loaded, perhaps with overrides."""
        _, parts = read_run(run)
        names = names_of(run)
        model, exporters = _loaded(stack, parts, names, device)
        kept = "generator.ema" in parts
        weights = weights or ("ema" if kept else "student")
        if weights not in {"ema", "student"} or (weights == "ema" and not kept):
            raise StackFault(
                f"weights: this run has {'ema and student' if kept else 'student'}, not {weights!r}"
            )
        assert model.generator is not None
        if weights == "ema":
            average = {k.removeprefix("generator."): v for k, v in parts["generator.ema"].items()}
            model.generator.load_state_dict(average)
        model.generator.to(device).eval().requires_grad_(False)
        tokenizer = Tokenizer(model, exporters).to(device).eval().requires_grad_(False)
        tokenizer.stack = stack
        weak = stack.sampler.weak and cls.from_pretrained(
            stack.sampler.weak, device=device, registry=stack.registry
        )
        labels = names.get(model.condition or "", ())
        weaker = weak.network if weak else None
        return cls(tokenizer, names=labels, hooks=_hooks(stack, model), weak=weaker, weights=weights)

    @property
    def spec(self) -> Any:
        return self.model.spec

    @property
    def condition(self) -> str | None:
        """The raw field that conditions it; None without a condition."""
        return self.model.condition

    @property
    def protocol(self) -> str:
        """Everything a number depends on beside the weights and the seed."""
        return protocol_of(self.model.stack, self.weights)

    def label(self, name: str | int) -> int:
        """The index of a label given by name or number; StackFault where there is none."""
        return self.conditions.label(name)

    # ---- sampling

    @torch.no_grad()
    def latents(
        self, n: int = 16, labels: Any = None, texts: Sequence[str] | None = None, seed: int = 0,
        batch: int = 64, standardized: bool = False, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Latents (n, C, h, w), raw unless ``standardized``.

        Args:
            n: samples. Sample i depends on (seed, first + i) and its condition alone, whatever the batch.
            labels: (n,) indices; None draws them.
            texts: n captions, for a generator that is conditioned on text; None is the null condition.
            seed: of noise and labels.
            batch: rows of one pass.
            standardized: give them as the generator makes them.
            first: number of the first sample.
        """
        condition = self.conditions.of(n, labels, texts, seed, first)
        grid, parts = self.spec.grid, []
        self.evaluations, self.refreshes, training = 0, 0, self.network.training
        self.network.eval()
        for start in range(0, n, batch):
            rows = slice(start, min(start + batch, n))
            clock = StepClock(seed, instance="generate", rank=first + start, device=self.tokenizer.device)
            own = None if condition is None else condition[rows]
            parts.append(self._call((rows.stop - start, self.spec.channels, *grid), own, clock))
        self.network.train(training)
        z = torch.cat(parts)
        return z if standardized else self.model.restore(z)

    def _call(self, shape: tuple[int, ...], condition: Any, clock: StepClock) -> Tensor:
        """One batch through the hooks; standardised."""
        subject: Any = self.network if self.sampler.kind != "path" else self.fitted(shape)

        def call(shape: tuple[int, ...]) -> Tensor:
            made: Tensor = self.sampler(subject, shape, condition, clock)
            return made

        try:
            z: Tensor = self.relay.vtp_sample(call=call, shape=shape)
        except Fault:
            raise
        except (ValueError, LookupError) as error:
            raise StackFault(f"sampler: {error}") from error
        if z.shape != shape:
            raise StackFault(f"the sampler gave {tuple(z.shape)}, {shape} was asked for")
        self.evaluations = max(self.evaluations, int(getattr(subject, "evaluations", 0)))
        self.refreshes = max(self.refreshes, int(getattr(subject, "refreshes", self.evaluations)))
        return z.to(next(self.network.parameters()).dtype)

    def field(self) -> Field:
        """A new field over the network with the stack's guidance and reuse."""
        keys = self.model.stack.sampler
        guidance = None if keys.guidance is None else validated(Guidance, "sampler.guidance", keys.guidance)
        reuse = None if keys.reuse is None else validated(Reuse, "sampler.reuse", keys.reuse)
        if guidance is not None and guidance.channels != "all" and guidance.channels > self.spec.channels:
            raise StackFault(
                f"sampler.guidance.channels: the first {guidance.channels} of {self.spec.channels} channels; write all"
            )
        auto = guidance is not None and guidance.use == "auto"
        if keys.weak is not None and not auto:
            raise StackFault(
                "sampler.weak: only guidance: {use: auto} compares with a weaker generator; leave it out"
            )
        if auto and guidance is not None and guidance.scale == 1:
            raise StackFault("sampler.guidance.scale: 1 is no guidance; auto wants one above, such as 1.4")
        null = self.conditions.null if self.spec.condition else None
        try:
            return Field(
                self.network, self.model.path, guidance=guidance, null=null, weak=self.weak, reuse=reuse
            )
        except ValueError as error:
            raise StackFault(f"sampler.{error}") from error

    def fitted(self, shape: tuple[int, ...]) -> Field:
        """The field of one batch; where the stack reuses states at the best steps, these are found once."""
        field = self.field()
        if field.reuse is None or field.reuse.use != "optimal":
            return field
        if self._reuse is None:
            few = (TEMPLATES, *shape[1:])
            clock = StepClock(instance="templates", device=self.tokenizer.device)
            conditions = self.conditions.templates(TEMPLATES)
            self._reuse = fitted(field.reuse, self.sampler, field.reusing(None), few, conditions, clock)
        return field.reusing(self._reuse)

    @torch.no_grad()
    def sample(
        self, n: int = 16, labels: Any = None, texts: Sequence[str] | None = None, seed: int = 0,
        batch: int = 64, first: int = 0,
    ) -> Tensor:  # fmt: skip
        """Pictures (n, 3, H, W) float in [0, 1] on the CPU; arguments as for :meth:`latents`."""
        z = self.latents(n, labels, texts, seed, batch, first=first)
        return torch.cat([self.tokenizer.decode(part).clamp(0, 1).float().cpu() for part in z.split(batch)])

    @torch.no_grad()
    def from_noise(self, noise: Tensor, condition: Any = None) -> Tensor:
        """Pictures from given initial noise (n, C, h, w): an interpolation between two samples, say."""
        clock = GivenClock(noise)
        z = self._call(tuple(noise.shape), condition, clock)
        return self.tokenizer.decode(self.model.restore(z)).clamp(0, 1).float().cpu()


def noise_of(generator: Generator, n: int, seed: int = 0) -> Tensor:
    """The initial noise of samples 0 to n - 1, (n, C, h, w)."""
    clock = StepClock(seed, instance="generate", device=generator.tokenizer.device)
    return clock.normal("noise", n, generator.spec.channels, *generator.spec.grid)


def _default_sampler(model: Model) -> Any:
    if model.path is None:
        raise StackFault(
            "sampler: this generator has no path and the stack names no sampler for it; see vtp list samplers"
        )
    stack = model.stack
    return resolve(stack.registry, "samplers", "sampler", DEFAULT, stack.dial).build(model.spec)


def _loaded(
    stack: Stack, parts: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, Sequence[str]], device: str
) -> tuple[Model, dict[str, Any]]:
    """Tokenizer and generator of a checkpoint, with what travels with the tokenizer."""
    if "generator" not in parts or stack.config.get("generator") is None:
        raise StackFault(
            "this run has no generator; train one: vtp train lightningdit-tiny tokenizer.from=RUN"
        )
    if "statistics" not in parts and "decoder" not in stack.config:
        raise DataFault("the checkpoint has no latent statistics")
    condition = stack.generator.condition
    exporters = exporters_of(stack, parts, device)
    embed = adopting.embedding(exporters)
    width = 0
    if condition is not None and condition not in names:
        if embed is None:
            raise DataFault(
                f"generator.condition: nothing embeds {condition!r}; install the plugin that exports embed_text"
            )
        width = embed([""]).shape[1]
    plans = without_training(blueprint(stack))
    model = build(plans, len(names.get(condition or "label", ())), width)
    load_modules(model, parts)
    model.statistics = dict(parts.get("statistics", {}))
    model.embed = embed
    return model, exporters


def _hooks(stack: Stack, model: Model) -> dict[str, Any]:
    from vtp_core.hooks import build_hooks

    return {
        name: hook for name, hook in build_hooks(stack, model.spec).items() if hasattr(hook, "vtp_sample")
    }
