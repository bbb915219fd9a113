"""Critics of adversarial objectives: their own optimizers, their own turn, before or after the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtp_core import distributed, schedule
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.errors import NonFinite, PluginFault
from vtp_core.forwards import detached
from vtp_core.optim import Optimizers
from vtp_core.options import Critic
from vtp_core.tally import Tally, finite
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import AdversarialObjective

Got = Mapping[str, Outputs]


class Critics:
    """The critics' part of a step.

    ``before``: the critic steps first, and the tokenizer's loss sees the new critic (DAC). ``after`` with
    ``reuse``: the critic sees the step's own outputs, detached (VQGAN). ``after`` with ``fresh``: the outputs
    are computed again in eval mode with the new weights (RAE).

    Args:
        model: with the objectives and their settings.
        steps: of the run.
        max_norm: of a critic's gradient, clipped by itself; None clips nothing.
    """

    def __init__(self, model: Model, steps: int, max_norm: float | None = None) -> None:
        self.model, self.steps, self.max_norm = model, steps, max_norm
        self.adversaries = {n: o for n, o in model.objectives.items() if isinstance(o, AdversarialObjective)}
        self.keys: dict[str, Critic] = {n: model.settings[n].critic for n in self.adversaries}
        self.optimizers: dict[str, Optimizers] = {}
        for name, objective in self.adversaries.items():
            trained = {n: p for n, p in objective.critic.named_parameters() if p.requires_grad}
            self.optimizers[name] = Optimizers({"critic": trained}, {"critic": self.keys[name].optim}, steps)
            self._train(name, False)
        self._step = 0
        self._backups: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def _train(self, name: str, on: bool) -> None:
        """Outside its own turn gradient passes through a critic and none stays."""
        for parameter in self.optimizers[name].parameters():
            parameter.requires_grad_(on)

    def begin(self, step: int) -> None:
        """Remember the critics that move before the finite check."""
        self._step, self._backups = step, {}
        for name in self.adversaries:
            if self._has_turn(name, "before", "reuse"):
                critic = {k: v.clone() for k, v in self.adversaries[name].critic.state_dict().items()}
                state = {k: v.clone() for k, v in self.optimizers[name].state().items()}
                self._backups[name] = (critic, state)

    def _has_turn(self, name: str, order: str, source: str) -> bool:
        keys = self.keys.get(name)
        return (
            keys is not None
            and keys.order == order
            and keys.input == source
            and self._active(name, self._step)
        )

    def _active(self, name: str, step: int) -> bool:
        return schedule.is_active(self.model.settings[name], step, self.steps, self.keys[name].start)

    def watching(self, step: int) -> frozenset[str]:
        """Objectives whose critic reads the step's own outputs at ``step``."""
        return frozenset(
            n for n, keys in self.keys.items() if keys.input == "reuse" and self._active(n, step)
        )

    def turn(self, name: str, got: Got, clock: StepClock, order: str) -> dict[str, Tensor]:
        """The critic's turn on this step's outputs, if it has one now; returns its terms.

        A critic that goes ``before`` steps at once; the gradient of one that goes ``after`` waits for
        :meth:`step`, behind the finite check.
        """
        if not self._has_turn(name, order, "reuse"):
            return {}
        terms = self._critique(name, got, clock)
        if order == "before":
            self._move(name, self._norms(name))
        return terms

    def norms(self) -> dict[str, dict[str, Tensor]]:
        """Gradient norms of the critics that wait for :meth:`step`, averaged over processes."""
        return {name: self._norms(name) for name in self.keys if self._has_turn(name, "after", "reuse")}

    def step(self, norms: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Critics that reused the step's outputs move, together with every other optimizer."""
        for name, own in norms.items():
            self._move(name, own)

    def fresh(
        self, outputs: Callable[[str, Mapping[str, Need], int], tuple[Got, StepClock]], micros: int
    ) -> dict[str, float]:
        """Turns on outputs computed again, in eval mode, after the optimizers stepped.

        Args:
            outputs: (objective, needs, micro-batch) to what it reads, without gradient, and its clock.
            micros: micro-batches per step.
        """
        row: dict[str, float] = {}
        for name in self.adversaries:
            if not self._has_turn(name, "after", "fresh"):
                continue
            tally = Tally(micros)
            needs = {slot: replace(need, mode="eval") for slot, need in self.adversaries[name].needs.items()}
            for micro in range(micros):
                got, clock = outputs(name, needs, micro)
                for term, value in self._critique(name, got, clock).items():
                    tally.add(term, value)
            norms = self._norms(name)
            found = tally.read({f"grad/{name}/critic": norm for norm in norms.values()})
            if not all(map(finite, found.values())):
                self.optimizers[name].clear()
                raise NonFinite(
                    f"step {self._step}: the fresh critic of objectives.{name} is not finite and has not "
                    f"moved: {found}"
                )
            self.adversaries[name].settle(clock)  # what it left would be lost at a checkpoint
            self._move(name, norms)
            row |= found
        return row

    def _critique(self, name: str, got: Got, clock: StepClock) -> dict[str, Tensor]:
        objective = self.adversaries[name]
        own = {slot: _detached(outputs) for slot, outputs in got.items()}
        self._train(name, True)
        try:
            with torch.enable_grad():
                terms = objective.critique(own, clock.of(f"{clock.instance}/critic"))
                if not terms:
                    raise PluginFault(f"objectives.{name}: critique() returned no term")
                total: Tensor = torch.stack(list(terms.values())).sum() * self.keys[name].weight
            (total / clock.micros).backward()
        finally:
            self._train(name, False)
        return {f"{name}/critic_{term}": value.detach() for term, value in terms.items()}

    def _norms(self, name: str) -> dict[str, Tensor]:
        distributed.average_gradients(self.optimizers[name].parameters())
        return self.optimizers[name].norms()

    def _move(self, name: str, norms: Mapping[str, Tensor]) -> None:
        self.optimizers[name].clip(norms, self.max_norm)
        self.optimizers[name].step(self._step)

    def undo(self) -> None:
        """The step was not finite: critics that moved go back, waiting gradients are dropped."""
        for name, (critic, state) in self._backups.items():
            self.adversaries[name].critic.load_state_dict(critic)
            self.optimizers[name].load(state)
        for optimizers in self.optimizers.values():
            optimizers.clear()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Optimizer tensors by part; critics themselves are in their objective's part."""
        return {f"optimizer/{name}": optimizers.state() for name, optimizers in self.optimizers.items()}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`state`."""
        for name, optimizers in self.optimizers.items():
            optimizers.load(parts.get(f"optimizer/{name}", {}))


def _detached(outputs: Outputs) -> Outputs:
    values: dict[str, Any] = {name: detached(value) for name, value in outputs.values.items()}
    return Outputs(values, outputs.mask, outputs.grid)


def critic_parameters(objective: nn.Module) -> set[int]:
    """Identities of an adversarial objective's critic parameters; empty for any other."""
    critic = getattr(objective, "critic", None)
    return {id(p) for p in critic.parameters()} if isinstance(critic, nn.Module) else set()
