"""Critics of adversarial objectives: their own optimizers, their own turn, before or after the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtp_core import distributed, schedule
from vtp_core.build import Model
from vtp_core.clock import StepClock
from vtp_core.errors import NonFinite, PluginFault
from vtp_core.optim import Optimizers
from vtp_core.options import Critic
from vtp_plugins.needs import Need, Outputs
from vtp_plugins.objective import AdversarialObjective

if TYPE_CHECKING:
    from vtp_core.engine import Engine
    from vtp_core.forwards import Inputs

Got = dict[str, Outputs]


class Critics:
    """The critics' part of a step.

    ``before``: the critic steps first, and the tokenizer's loss sees the new critic (DAC). ``after`` with
    ``reuse``: the critic sees the step's own outputs, detached (VQGAN). ``after`` with ``fresh``: the outputs
    are computed again in eval mode with the new weights (RAE).

    Args:
        model: with the objectives and their settings.
        steps: of the run.
    """

    def __init__(self, model: Model, steps: int) -> None:
        self.model, self.steps = model, steps
        self.adversaries = {n: o for n, o in model.objectives.items() if isinstance(o, AdversarialObjective)}
        self.keys: dict[str, Critic] = {n: model.settings[n].critic for n in self.adversaries}
        self.optimizers = {
            name: Optimizers({"critic": dict(o.critic.named_parameters())}, {"critic": self.keys[name].optim}, steps)
            for name, o in self.adversaries.items()
        }
        for objective in self.adversaries.values():
            objective.critic.requires_grad_(False)  # gradient passes through it, none stays
        self._step = 0
        self._backups: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def begin(self, step: int) -> None:
        """Remember the critics that move before the finite check."""
        self._step = step
        self._backups = {}
        for name in self.adversaries:
            if self.keys[name].order == "before" and self._active(name):
                critic = {k: v.clone() for k, v in self.adversaries[name].critic.state_dict().items()}
                state = {k: v.clone() for k, v in self.optimizers[name].state().items()}
                self._backups[name] = (critic, state)

    def _active(self, name: str) -> bool:
        return schedule.is_active(self.model.settings[name], self._step, self.steps, self.keys[name].start)

    def turn(self, name: str, got: Got, clock: StepClock, order: str) -> dict[str, Tensor]:
        """The critic's turn on this step's outputs, if it has one now; returns its terms.

        A critic that goes ``before`` steps at once; the gradient of one that goes ``after`` waits for
        :meth:`step`, behind the finite check.
        """
        keys = self.keys.get(name)
        if keys is None or keys.order != order or keys.input != "reuse" or not self._active(name):
            return {}
        terms = self._critique(name, got, clock)
        if order == "before":
            self._move(name)
        return terms

    def step(self) -> None:
        """Critics that reused the step's outputs move, together with every other optimizer."""
        for name, keys in self.keys.items():
            if keys.order == "after" and keys.input == "reuse" and self._active(name):
                self._move(name)

    def fresh(self, engine: Engine, inputs: Inputs, clock: StepClock) -> dict[str, float]:
        """Turns on outputs computed again, in eval mode, after the optimizers stepped."""
        row: dict[str, float] = {}
        for name, keys in self.keys.items():
            if keys.input != "fresh" or not self._active(name):
                continue
            with torch.no_grad():
                plan = engine.plan_of({name: _in_eval(self.adversaries[name].needs)})
                run = engine.forwards(plan, inputs, clock)
                got = {slot: run.hand(handout) for slot, handout in plan.handouts[name, 0].items()}
            terms = self._critique(name, got, clock)
            row |= {term: float(value) for term, value in terms.items()}
            if any(value - value != 0 for value in row.values()):
                raise NonFinite(f"step {self._step}: critic of {name!r} is not finite: {row}")
            self._move(name)
        return row

    def _critique(self, name: str, got: Got, clock: StepClock) -> dict[str, Tensor]:
        objective = self.adversaries[name]
        detached = {slot: _detached(outputs) for slot, outputs in got.items()}
        objective.critic.requires_grad_(True)
        with torch.enable_grad():
            terms = objective.critique(detached, clock.of(f"{name}/critic"))
            if not terms:
                raise PluginFault(f"objectives.{name}: critique() returned no term")
            total: Tensor = torch.stack(list(terms.values())).sum() * self.keys[name].weight
            (total / clock.micros).backward()
        objective.critic.requires_grad_(False)
        return {f"{name}/critic_{term}": value.detach() for term, value in terms.items()}

    def _move(self, name: str) -> None:
        distributed.average_gradients(self.optimizers[name].parameters())
        self.optimizers[name].step(self._step)

    def undo(self) -> None:
        """The step was not finite: critics that moved go back, waiting gradients are dropped."""
        for name, (critic, state) in self._backups.items():
            self.adversaries[name].critic.load_state_dict(critic)
            for optimizer in self.optimizers[name].optimizers.values():
                optimizer.state.clear()
            self.optimizers[name].load(state)
        for optimizers in self.optimizers.values():
            optimizers.clear()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Optimizer tensors by part; critics themselves are in their objective's part."""
        return {f"optimizer/{name}": optimizers.state() for name, optimizers in self.optimizers.items()}

    def load(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of :meth:`state`."""
        for name, optimizers in self.optimizers.items():
            optimizers.load(parts[f"optimizer/{name}"])


def _in_eval(needs: Mapping[str, Need]) -> dict[str, Need]:
    """The same needs in eval mode."""
    keys = ("view", "want", "source", "mask", "drop", "through", "cut", "draw")
    return {slot: Need(mode="eval", **{k: getattr(need, k) for k in keys}) for slot, need in needs.items()}


def _detached(outputs: Outputs) -> Outputs:
    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        return value.detach() if isinstance(value, Tensor) else value

    return Outputs({k: cut(v) for k, v in outputs.values.items()}, outputs.mask, outputs.grid)


def critic_parameters(objective: nn.Module) -> set[int]:
    """Identities of an adversarial objective's critic parameters; empty for any other."""
    critic = getattr(objective, "critic", None)
    return {id(p) for p in critic.parameters()} if isinstance(critic, nn.Module) else set()
